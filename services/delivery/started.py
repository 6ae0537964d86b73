"""Marks in Redis that a task has begun to run: only such a task counts when its worker dies.

The mark has to be on its way before the task runs, and nobody may wait for it. It is written to a connection on
which Redis does not answer; what the kernel has taken arrives even when this process is killed the moment after.
"""

from __future__ import annotations

import threading
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from services.queues import UNACKED_STARTED


class StartMarks:
    """The connection for marks. A mark that cannot be sent is repeated with the next renewal of its lease."""

    def __init__(self, client: Redis) -> None:
        self._connection: Any = client.connection_pool.make_connection()
        self._lock = threading.Lock()
        self._ready = False

    def connect(self) -> None:
        """Connect, or connect again. Raises redis.exceptions.RedisError."""
        if self._ready:
            return
        with self._lock:
            self._connection.disconnect()
            self._connection.connect()
            self._write("CLIENT", "REPLY", "OFF")
            self._ready = True

    def send(self, tag: str) -> None:
        """Mark `tag` as started."""
        if not self._ready:
            return
        with self._lock:
            try:
                self._write("SADD", UNACKED_STARTED, tag)
            except (RedisError, OSError):
                self._ready = False

    def _write(self, *command: str) -> None:
        # A health check would wait for an answer that does not come.
        packed = self._connection.pack_command(*command)
        self._connection.send_packed_command(packed, check_health=False)
