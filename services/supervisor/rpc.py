"""Supervisor's commands over its Unix socket, http://supervisord.org/api.html."""

import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Error, ServerProxy, Transport

# As docker/supervisor/worker.conf has it.
LOGIN = "stalk:stalk"
# What a command raises when Supervisor does not answer, or refuses it.
ERRORS = (OSError, HTTPException, Error)


def connect(path: Path, timeout: float | None = None) -> Any:
    """The commands of the Supervisor whose socket is `path`; an answer may take `timeout` seconds, or for ever.

    Connects anew for each command. A command raises one of ERRORS.
    """
    return ServerProxy(f"http://{LOGIN}@localhost", transport=_Transport(path, timeout)).supervisor


class _Transport(Transport):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__()
        self._path, self._timeout = path, timeout

    def make_connection(self, host: Any) -> HTTPConnection:
        # The login of the URL becomes a header here.
        _, self._extra_headers, _ = self.get_host_info(host)
        return _Connection(self._path, self._timeout)


class _Connection(HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost")
        self._path, self._seconds = path, timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(str(self._path))
