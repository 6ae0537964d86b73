"""Redis commands, counted: all of them, and those that came over a connection."""

import re
import socket
from collections.abc import Mapping
from threading import Thread
from typing import Any

from tests.support.redis.server import RedisServer
from tests.support.waiting import wait_until

# Commands that only the benchmark itself sends while it counts.
OURS = {"info", "type"}
# A line of MONITOR: its time, then the database and who sent the command: an address, or a script.
LINE = re.compile(rb"^\+[\d.]+ \[\d+ (\S+)\] \"(\S+?)\"", re.MULTILINE)
# Redis answers within milliseconds.
ANSWER_SECONDS = 10


def count_calls(statistics: Mapping[str, Any]) -> int:
    """Calls in INFO commandstats, those inside scripts included and those of the benchmark left out."""
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in statistics.items()}
    return sum(number for name, number in calls.items() if name not in OURS)


def count_from_outside(output: bytes) -> int:
    """Commands that MONITOR saw come over a connection: a script's own, and the benchmark's, left out."""
    return sum(1 for who, name in LINE.findall(output) if who != b"lua" and name.decode().lower() not in OURS)


class Monitor:
    """Everything that a Redis server executes from now on, until it is closed.

    INFO does not tell a script's commands from others. This makes Redis slower, so nothing is timed meanwhile.
    """

    def __init__(self, redis: RedisServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", redis.port), timeout=ANSWER_SECONDS)
        self._output = bytearray()
        self._socket.sendall(f"AUTH {redis.password}\r\nMONITOR\r\n".encode())
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_until(lambda: self._output.count(b"+OK") == 2, ANSWER_SECONDS, "MONITOR is accepted")

    def close(self) -> bytes:
        """Stop, and return the output."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(ANSWER_SECONDS)
        self._socket.close()
        return bytes(self._output)

    def _read(self) -> None:
        # The timeout was for connecting; a server may be idle for longer.
        self._socket.settimeout(None)
        while piece := self._socket.recv(1 << 16):
            self._output += piece
