"""Marks in Redis that a task has begun to run: only such a task counts when its worker dies.

The mark has to be on its way before the task runs, and nobody may wait for it. It is written to a connection on
which Redis does not answer; what the kernel has taken arrives even when this process is killed the moment after.
With it go acknowledgements that wait for company (ack.py): of tasks that have ended in a process which may be killed
by the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from celery.utils.log import get_logger
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from services.broker import scripts
from services.broker.keys import HELD, UNACKED_STARTED

logger = get_logger(__name__)


class StartMarks:
    """The connection for marks. A mark that cannot be sent is repeated with the next renewal of its lease."""

    def __init__(self, client: Redis) -> None:
        self._connection: Any = client.connection_pool.make_connection()
        self._lock = threading.Lock()
        self._ready = self._refused = False

    def connect(self) -> None:
        """Connect, or connect again. Raises redis.exceptions.RedisError."""
        with self._lock:
            if self._refused or (self._ready and not self._ended()):
                return
            self._ready = False
            self._connection.disconnect()
            self._connection.connect()
            try:
                self._silence()
            except ResponseError as error:
                self._refused = True
                self._connection.disconnect()
                logger.warning("lease: Redis refuses CLIENT REPLY (%s): starts are marked with renewals only", error)
            else:
                self._ready = True

    def send(self, tag: str, acks: Sequence[str] = ()) -> None:
        """Mark `tag` as started, after acknowledging `acks`, which have to be acknowledged once more to be sure."""
        commands: list[tuple[str | int, ...]] = [("SADD", UNACKED_STARTED, tag)]
        if acks:
            # With its text: nobody would hear that Redis does not know its name.
            commands.insert(0, ("EVAL", scripts.ACK.text, len(HELD), *HELD, *acks))
        with self._lock:
            if not self._ready:
                return
            try:
                self._write(*commands)
            except (RedisError, OSError):
                self._ready = False

    def _silence(self) -> None:
        """Have Redis answer no more. Raises ResponseError where a user may not ask for that."""
        self._write(("CLIENT", "REPLY", "OFF"), ("CLIENT", "REPLY", "ON"))
        # The answer to the second one: the first has none.
        self._connection.read_response()
        self._write(("CLIENT", "REPLY", "OFF"))

    def _ended(self) -> bool:
        """Whether Redis has closed the connection: nothing else can come. The kernel takes a write all the same."""
        try:
            return bool(self._connection.can_read(0))
        except (RedisError, OSError):
            return True

    def _write(self, *commands: tuple[str | int, ...]) -> None:
        # A health check would wait for an answer that does not come.
        self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
