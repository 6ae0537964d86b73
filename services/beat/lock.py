"""Beat's lock: of all beats only the one that has it sends periodic tasks; it takes or renews it at each tick."""

from typing import Any

from celery.utils.log import get_logger
from redis.exceptions import LockError, RedisError

from services.broker.keys import BEAT_LOCK, BEAT_LOCK_SECONDS

logger = get_logger(__name__)


class BeatLock:
    """A lock in Redis. Commands raise redis.exceptions.RedisError."""

    def __init__(self, client: Any) -> None:
        self._lock = client.lock(BEAT_LOCK, timeout=BEAT_LOCK_SECONDS, thread_local=False)

    @property
    def token(self) -> bytes | None:
        """What the key has as its value: another one each time that the lock is taken; None without the lock."""
        token: bytes | None = self._lock.local.token
        return token

    def acquire(self) -> bool:
        """Renew the lock, or take it if it is free; False when another beat has it."""
        if self.token:
            try:
                return bool(self._lock.reacquire())
            except LockError:
                logger.warning("beat: lost the lock: Redis was emptied, or this beat was suspended for too long")
                self._lock.local.token = None
        return bool(self._lock.acquire(blocking=False))

    def is_held(self, pipe: Any) -> bool:
        """Whether Redis says so too: a beat that was suspended may have been replaced."""
        owner = pipe.get(BEAT_LOCK)
        return self.token is not None and owner == self.token.decode()

    def release(self) -> None:
        """Leave the lock to the next beat."""
        try:
            if self.token:
                self._lock.release()
        except RedisError as error:
            logger.warning("beat: the lock could not be released (%s); it runs out in %d s", error, BEAT_LOCK_SECONDS)
