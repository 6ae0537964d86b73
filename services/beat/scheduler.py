"""Beat's scheduler: RedBeat with a lock that is safe, and with runs that are sent exactly once.

RedBeat takes its lock in a signal that an embedded beat (`celery worker -B`) never gets, waits for it without a
heartbeat, and dies when Redis is emptied (celery-redbeat 2.4.2). Here each tick takes or renews the lock, and the
beat that takes it writes the schedule again.

RedBeat stores that a run is done before it sends it, and ignores an error of the sending: when Redis is full for a
moment, or beat dies in between, the run is lost. Here message and schedule are written in one transaction, which
fails unless this beat has the lock and the entry is as it was read: a run is sent once, or it is still due, whenever
beat or Redis dies. A run that could not be sent is retried at each tick and logged with how late it is. Periods that
were missed are not made up for: the next one counts from when the run was sent. Limit: a message to a fanout
exchange (a broadcast) is published before the transaction, because Redis keeps no list for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.beat import ScheduleEntry, SchedulingError
from celery.result import denied_join_result
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid
from redbeat.decoder import to_timestamp
from redbeat.schedulers import RedBeatScheduler
from redis.exceptions import ConnectionError, RedisError, TimeoutError, WatchError

from config import Settings
from services.beat import entries
from services.beat.lock import BeatLock
from services.broker.client import format_error
from services.broker.keys import BEAT_LOCK, BEAT_LOCK_SECONDS
from services.broker.outages import Outage
from services.schedule import ENTRIES
from services.supervisor.heartbeat_file import STANDBY, TICKING, WAITING, HeartbeatFile

logger = get_logger(__name__)

# Five looks at the schedule before the lock runs out: one slow command does not lose it.
TICK_SECONDS = 5.0
STANDBY_SECONDS = 2.0
# Redis is back within a second or within minutes; a try each second costs nothing.
RETRY_SECONDS = 1.0
# A busy beat is late by less; a run that is later is logged, because somebody may look for the reason.
LATE_SECONDS = 2.0
AWAY = (ConnectionError, TimeoutError, OperationalError, OSError)


class LockedScheduler(RedBeatScheduler):  # type: ignore[misc]
    """RedBeat's schedule in Redis, sent by the one beat that holds the lock."""

    def __init__(self, app: Any, **options: Any) -> None:
        settings: Settings = app.settings
        self._heartbeat = HeartbeatFile(settings.stack.run_directory, "beat")
        self._word = ""
        # The lock's token when the schedule was written.
        self._written_under: bytes | None = None
        # Entry → its last run, and the task id of the next: each try sends the same one, or Flower shows a task a try.
        self._run_ids: dict[str, tuple[Any, str]] = {}
        # Entry → its definition and meta as they were read.
        self._stored: dict[str, Any] = {}
        # Keys of the entries whose score in Redis says that they are due.
        self._due_keys: set[str] = set()
        # Entry → why its next run could not be sent, at this tick and at the one before.
        self._unsent: dict[str, str] = {}
        self._unsent_before: dict[str, str] = {}
        # Entry → why Redis refused its run at this tick.
        self._refused: dict[str, Exception] = {}
        self._outage = Outage("beat", logger.warning)
        self._lock = BeatLock(app.redbeat_redis)
        super().__init__(app, **options)
        # None switches off RedBeat's own handling of the lock.
        self.lock_key = None

    def setup_schedule(self) -> None:
        """Do nothing: the schedule is written when this beat gets the lock."""

    def tick(self, **options: Any) -> float:
        """Send what is due if this beat holds the lock; seconds until the next tick."""
        self._unsent_before, self._unsent, self._refused = self._unsent, {}, {}
        try:
            if not self._lock.acquire():
                self._outage.record_recovery()
                self._say(STANDBY)
                return STANDBY_SECONDS
            if self._written_under != self._lock.token:
                self._write_schedule()
            seconds = super().tick(**options)
        except (*AWAY, RedisError) as error:
            # This tick has not reached all entries: keep what was logged of them, so that it is not logged again.
            self._unsent = self._unsent_before | self._unsent
            return self._wait(error, "the runs that are due")
        if self._refused:
            return self._wait(next(iter(self._refused.values())), ", ".join(sorted(self._refused)))
        self._outage.record_recovery()
        self._say(TICKING)
        return float(min(seconds, TICK_SECONDS))

    def _wait(self, error: Exception, what: str) -> float:
        """Log, once an outage, that Redis does not take `what`; seconds until the next tick."""
        self._outage.record_failure(error, f"Redis at {self.app.settings.broker_url.mask()}", f"take {what}")
        # No heartbeat from one that answers and refuses: that is a fault somebody has to mend.
        if isinstance(error, AWAY):
            self._say(WAITING)
        return RETRY_SECONDS

    # RedBeat's tick passes a producer to maybe_due, for which it would block here until Redis is back.
    _maybe_due_kwargs: dict[str, Any] = {}  # noqa: RUF012

    def maybe_due(self, entry: Any, **_: Any) -> float:
        """Send the entry's next run if it is due; seconds until the entry should be checked again.

        Raises one of AWAY when Redis is away. Any other error is logged and does not affect other entries.
        """
        try:
            due, seconds = entry.is_due()
            if due:
                self._send(entry)
            elif entry.key in self._due_keys and not 0 <= entry.score <= to_timestamp(self.app.now()):
                # It has been saved: store its new score. One that is switched off and would be due keeps its own.
                self._commit(entry, entry, [])
        except AWAY:
            raise
        except Exception as error:  # whatever its schedule, its options, a signal's receivers or Redis raise here
            self._report(entry.name, "could not be sent", error)
            return RETRY_SECONDS
        # None for a schedule that has ended.
        return float(seconds or TICK_SECONDS)

    def _send(self, entry: Any) -> None:
        late = _get_lateness(entry)
        messages = self._build_messages(entry)
        if self._commit(entry, ScheduleEntry._next_instance(entry), messages):
            logger.info("beat: sent %s (%s)", entry.name, entry.task)
            if late > LATE_SECONDS:
                logger.warning("beat: %s was sent late by %.0f s", entry.name, late)
        # Otherwise another beat has the lock or has sent this run; the next tick reads the entry again.

    def _build_messages(self, entry: Any) -> list[tuple[str, str, int | None]]:
        """Build the messages of the next run: Redis key, message, and milliseconds until the queue expires."""
        # The entry may be changed: entries are read again at each tick.
        entry.options = {"task_id": self._run_id(entry)} | entry.options | {"retry": False}
        # Without denied_join_result Celery subscribes to the run's result, which fails when the Redis for results is
        # away (celery 5.7).
        with self._collect_messages() as (producer, collected), denied_join_result():
            try:
                self.apply_async(entry, producer=producer, advance=False)
            except SchedulingError as error:
                raise _unwrap(error) from None
        return collected

    @contextmanager
    def _collect_messages(self) -> Iterator[tuple[Any, list[tuple[str, str, int | None]]]]:
        """A producer that declares queues, and a list that it appends messages to in place of publishing them."""
        collected: list[tuple[str, str, int | None]] = []
        with self.app.connection_for_write() as connection:
            # Not connection.default_channel, which blocks until Redis is back.
            channel = connection.channel()

            def put(queue: str, message: dict[str, Any], **_: Any) -> None:
                key = channel._q_for_pri(queue, channel._get_message_priority(message, reverse=False))
                collected.append((key, dumps(message), channel._expires.get(queue)))

            # kombu's virtual transports publish with this method.
            channel._put = put
            yield self.app.amqp.Producer(channel, auto_declare=False), collected

    def _commit(self, entry: Any, following: Any, messages: list[tuple[str, str, int | None]]) -> bool:
        """Send the messages and store the next run in one transaction; False if another beat has done so."""
        with self.app.redbeat_redis.pipeline() as pipe:
            pipe.watch(BEAT_LOCK, entry.key)
            stored = pipe.hmget(entry.key, *entries.STORED)
            if not self._lock.is_held(pipe) or stored != self._stored[entry.name]:
                return False
            pipe.multi()
            for key, message, expires in messages:
                pipe.lpush(key, message)
                if expires:
                    pipe.pexpire(key, expires)
            # As RedBeat's own _next_instance does (celery-redbeat 2.4.2).
            pipe.hset(entry.key, "meta", entries.encode_meta(following))
            pipe.zadd(self.app.redbeat_conf.schedule_key, {entry.key: following.score})
            try:
                pipe.execute()
            except WatchError:
                return False
        return True

    def _run_id(self, entry: Any) -> str:
        last_run_at, task_id = self._run_ids.get(entry.name, (None, ""))
        if not task_id or last_run_at != entry.last_run_at:
            task_id = uuid()
            self._run_ids[entry.name] = entry.last_run_at, task_id
        return task_id

    def _report(self, name: str, what: str, error: Exception) -> None:
        if isinstance(error, RedisError):
            self._refused[name] = error
            return
        reason = format_error(error)
        if reason not in (self._unsent.get(name), self._unsent_before.get(name)):
            logger.error("beat: %s %s (%s); trying at each tick", name, what, reason)
        self._unsent[name] = reason

    def close(self) -> None:
        """Release the lock for the next beat."""
        self._lock.release()
        super().close()

    def _write_schedule(self) -> None:
        """Write the code's entries, remove those that it no longer has, and correct when others are due."""
        logger.info("beat: got the lock, writing the schedule")
        conf, client = self.app.redbeat_conf, self.app.redbeat_redis
        for name in {*client.smembers(conf.statics_key), *ENTRIES} - conf.schedule.keys():
            entries.remove(self.Entry(name, app=self.app))
            client.srem(conf.statics_key, name)
        for name, definition in conf.schedule.items():
            try:
                entries.write(self._maybe_entry(name, definition))
            except (*AWAY, RedisError):
                raise
            except Exception as error:  # an entry of the code may have any mistake
                logger.error("beat: the code's entry %s cannot be written (%r)", name, error)
        self._correct_due_times()
        self._written_under = self._lock.token

    def _correct_due_times(self) -> None:
        """Correct the scores of entries that another release, or a process in another time zone, has saved too late.

        A score that is too early is harmless, and may come from a process that saves the entry just now.
        """
        key = self.app.redbeat_conf.schedule_key
        due = {}
        for entry in self._read(self.app.redbeat_redis.zrange(key, 0, -1)):
            try:
                due[entry.key] = entry.score
            except Exception as error:  # a schedule may raise anything
                self._report(entry.name, "could not be sent", error)
        if due := {name: score for name, score in due.items() if score >= 0}:
            self.app.redbeat_redis.zadd(key, due, xx=True, lt=True)

    @property
    def schedule(self) -> dict[str, Any]:
        """The entries that are due, and the next one, from which the tick computes how long to sleep."""
        self._stored = {}
        key, now = self.app.redbeat_conf.schedule_key, to_timestamp(self.app.now())
        with self.app.redbeat_redis.pipeline() as pipe:
            pipe.zrangebyscore(key, 0, now)
            pipe.zrangebyscore(key, f"({now}", now + self.max_interval, start=0, num=1)
            due, following = pipe.execute()
        self._due_keys = set(due)
        found = {entry.name: entry for entry in self._read(due + following)}
        self._run_ids = {name: run for name, run in self._run_ids.items() if name in found}
        return found

    def _read(self, keys: list[str]) -> Iterator[Any]:
        """Read the entries under these keys; those that cannot be read are logged and left in Redis."""
        for key, stored in zip(keys, entries.fetch(self.app.redbeat_redis, keys), strict=True):
            try:
                entry = entries.read(self.app, key, stored)
            except entries.EntryRemoved:
                self._forget(key)
            except entries.InvalidEntry as error:
                self._report(key, "cannot be read", error)
            else:
                self._stored[entry.name] = stored
                yield entry

    def _forget(self, key: str) -> None:
        """Remove a deleted entry from the sorted set of the schedule, unless it has been saved again."""

        def forget(pipe: Any) -> None:
            there = pipe.hexists(key, "definition")
            pipe.multi()
            if not there:
                pipe.zrem(self.app.redbeat_conf.schedule_key, key)

        self.app.redbeat_redis.transaction(forget, key)

    def _say(self, word: str) -> None:
        # An outage has lines of its own.
        if word != self._word and WAITING not in (word, self._word):
            logger.info("beat: %s", word)
        self._word = word
        if self._heartbeat.usable:
            self._heartbeat.touch(word)

    @property
    def info(self) -> str:
        url = self.app.settings.broker_url.mask()
        return f"       . redis -> {url}\n       . lock -> {BEAT_LOCK} ({BEAT_LOCK_SECONDS} s)"


def _unwrap(error: BaseException) -> BaseException:
    """Return the error inside Celery's, and kombu's: its class tells whether Redis is away or refuses (celery 5.7)."""
    error = error.__context__ or error
    return error.__cause__ or error if isinstance(error, OperationalError) else error


def _get_lateness(entry: Any) -> float:
    """Seconds for which the entry's next run has been due; 0 for an entry that has never run."""
    left = entry.last_run_at and entry.schedule.remaining_estimate(entry.last_run_at)
    return max(0.0, -left.total_seconds()) if left else 0.0
