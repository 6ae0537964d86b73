"""A TCP proxy in front of Redis that loses what a test tells it to lose."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.support.waiting import wait_until

BUFFER = 65_536
PATIENCE = 10


class Proxy:
    """Passes everything on, until `lose_answer_to` names a command whose answer is to be lost."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._word = b""
        # How often an answer was lost: a test makes sure that it has happened.
        self.lost = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def lose_answer_to(self, word: bytes) -> None:
        """Redis gets the next command with this word in it; its answer is lost together with the connection."""
        with self._lock:
            self._word = word

    def wait_lost(self, times: int = 1) -> None:
        """Wait until as many answers as that were lost."""
        wait_until(lambda: self.lost >= times, PATIENCE, f"{times} answers were lost", lambda: f"lost: {self.lost}")

    def close(self) -> None:
        for one in [self._listener, *self._sockets]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                # Set while the answer on its way is to be lost.
                doomed = threading.Event()
                threading.Thread(target=self._forward, args=(client, server, doomed), daemon=True).start()
                threading.Thread(target=self._back, args=(client, server, doomed), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(BUFFER):
                with self._lock:
                    if self._word and self._word in data:
                        self._word = b""
                        doomed.set()
                server.sendall(data)
        self._end(client, server)

    def _back(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(BUFFER):
                if doomed.is_set():
                    self.lost += 1
                    break
                client.sendall(data)
        self._end(client, server)

    def _end(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
