"""What Redis is told of this process's leases: that they are renewed, and that the task of one has started.

Only a task that has started counts a delivery when its worker dies. The mark of a start has to be on its way before
the task runs, and the task does not wait for it: it is written to a connection on which Redis does not reply, and what
the kernel has taken arrives even when this process is killed the moment after. Acknowledgements that still wait
(ack_buffer.py) go with it: their tasks have ended in a process which the next one may kill.
"""

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from celery.utils.log import get_logger
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from services.broker import scripts
from services.broker.keys import UNACKED_KEYS, UNACKED_STARTED

logger = get_logger(__name__)


class Leases:
    """The leases of one process in one Redis.

    Renewals go over `client`, marks over a connection of their own. A mark that cannot be sent is repeated with the
    next renewal.
    """

    def __init__(self, client: Redis, seconds: int) -> None:
        self._client, self._seconds = client, seconds
        self._connection: Any = client.connection_pool.make_connection()
        self._lock = threading.Lock()
        self._ready = self._refused = False

    def renew(self, started: Sequence[str], others: Sequence[str]) -> list[str]:
        """Renew the leases of these tags, and mark those that have started. Returns the tags whose lease was lost.

        Raises redis.exceptions.RedisError.
        """
        lost = scripts.RENEW(self._client, UNACKED_KEYS, [self._seconds, len(started), *started, *others])
        return [tag.decode() for tag in lost]

    def connect(self) -> None:
        """Open the connection for marks, or open it again. Raises redis.exceptions.RedisError."""
        with self._lock:
            if self._refused or (self._ready and not self._is_closed_by_redis()):
                return
            self._ready = False
            self._connection.disconnect()
            self._connection.connect()
            try:
                self._switch_replies_off()
            except ResponseError as error:
                self._refused = True
                self._connection.disconnect()
                logger.warning("lease: Redis refuses CLIENT REPLY (%s): starts are marked with renewals only", error)
            else:
                self._ready = True

    def prepare_marks(self) -> None:
        """Open the connection for marks before a claim; where that fails, the lease manager tries again and logs it."""
        with suppress(RedisError, OSError):
            self.connect()

    def mark_started(self, tag: str, acks: Sequence[str] = ()) -> None:
        """Mark `tag` as started, after acknowledging `acks`; these are acknowledged again, because no reply comes."""
        commands: list[tuple[str | int, ...]] = [("SADD", UNACKED_STARTED, tag)]
        if acks:
            # With the script's text: no reply would say that Redis does not know its name.
            commands.insert(0, ("EVAL", scripts.ACK.text, len(UNACKED_KEYS), *UNACKED_KEYS, *acks))
        with self._lock:
            if not self._ready:
                return
            try:
                self._write(*commands)
            except (RedisError, OSError):
                self._ready = False

    def _switch_replies_off(self) -> None:
        """Raises ResponseError where the user may not do that."""
        self._write(("CLIENT", "REPLY", "OFF"), ("CLIENT", "REPLY", "ON"))
        # The reply to the second command: the first has none.
        self._connection.read_response()
        self._write(("CLIENT", "REPLY", "OFF"))

    def _is_closed_by_redis(self) -> bool:
        """Whether there is something to read: without replies that can only be the end of the connection."""
        try:
            return bool(self._connection.can_read(0))
        except (RedisError, OSError):
            return True

    def _write(self, *commands: tuple[str | int, ...]) -> None:
        # A health check would wait for a reply that does not come.
        self._connection.send_packed_command(self._connection.pack_commands(commands), check_health=False)
