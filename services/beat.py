"""Beat's scheduler: RedBeat, with a lock that one beat holds and every other waits for.

RedBeat takes its lock in a signal that an embedded beat (`celery worker -B`) never gets, waits for it without a
sign of life, and dies when Redis is emptied (celery-redbeat 2.4.2). Here each tick takes or renews the lock, and
whoever takes it writes the schedule again.
"""

from __future__ import annotations

from typing import Any

from celery.utils.log import get_logger
from redbeat.schedulers import RedBeatScheduler
from redis.exceptions import ConnectionError, LockError, RedisError, TimeoutError

from config import Settings
from services.connections import connect
from services.heartbeat import STANDBY, TICKING, WAITING, HeartbeatFile
from services.queues import BEAT_LOCK

logger = get_logger(__name__)

# A beat that is gone is replaced when its lock runs out: with the next look of the standby, within 30 s.
LOCK_SECONDS = 25
# Five looks at the schedule before the lock runs out: one slow command does not lose it.
TICK_SECONDS = 5.0
STANDBY_SECONDS = 2.0
# Redis is back within a second or within minutes; looking each second costs nothing.
RETRY_SECONDS = 1.0


class LockedScheduler(RedBeatScheduler):  # type: ignore[misc]
    """RedBeat's schedule in Redis, sent by the one beat that holds the lock."""

    def __init__(self, app: Any, **options: Any) -> None:
        settings: Settings = app.settings
        # RedBeat's own URL parser knows neither sockets nor sentinels; a client that is there is used as it is.
        app.redbeat_redis = connect(settings.broker_url, settings, decode_responses=True)
        self._heartbeat = HeartbeatFile(settings.stack.run_directory, "beat")
        self._word = ""
        self._written = False
        self._held = app.redbeat_redis.lock(BEAT_LOCK, timeout=LOCK_SECONDS, thread_local=False)
        super().__init__(app, **options)
        # None switches off RedBeat's own handling of the lock.
        self.lock_key = None

    def setup_schedule(self) -> None:
        """Nothing yet: the schedule is written by the beat that gets the lock."""

    def tick(self, **options: Any) -> float:
        """Send what is due if this beat holds the lock; seconds until the next tick."""
        try:
            if not self._hold_lock():
                self._say(STANDBY)
                return STANDBY_SECONDS
            seconds = super().tick(**options)
        except (ConnectionError, TimeoutError) as error:
            self._say(WAITING, f"waiting for Redis ({error})")
            return RETRY_SECONDS
        except RedisError as error:
            # No heartbeat: a Redis that answers and refuses is a fault somebody has to mend.
            logger.error("beat: Redis refused a tick: %s", error)
            return RETRY_SECONDS
        self._say(TICKING)
        return float(min(seconds, TICK_SECONDS))

    def close(self) -> None:
        """Give the lock to whoever waits for it."""
        try:
            if self._held.local.token:
                self._held.release()
        except RedisError as error:
            logger.warning("beat: the lock could not be released (%s); it runs out in %d s", error, LOCK_SECONDS)
        super().close()

    def _hold_lock(self) -> bool:
        """Renew the lock, or take it if it is free; whoever takes it writes the schedule."""
        if self._held.local.token:
            try:
                self._held.extend(LOCK_SECONDS, replace_ttl=True)
            except LockError:
                logger.warning("beat: lost the lock: Redis was emptied, or this beat stood still for too long")
                self._held.local.token, self._written = None, False
        if not self._held.local.token and not self._held.acquire(blocking=False):
            return False
        if not self._written:
            logger.info("beat: got the lock, writing the schedule")
            super().setup_schedule()
            self._written = True
        return True

    def _say(self, word: str, message: str = "") -> None:
        if word != self._word:
            logger.info("beat: %s", message or word)
            self._word = word
        if self._heartbeat.usable:
            self._heartbeat.touch(word)

    @property
    def info(self) -> str:
        url = self.app.settings.broker_url.masked()
        return f"       . redis -> {url}\n       . lock -> {BEAT_LOCK} ({LOCK_SECONDS} s)"
