"""Beat's scheduler: RedBeat, with a lock that one beat holds and every other waits for.

RedBeat takes its lock in a signal that an embedded beat (`celery worker -B`) never gets, waits for it without a
sign of life, and dies when Redis is emptied (celery-redbeat 2.4.2). Here each tick takes or renews the lock, and
whoever takes it writes the schedule again.

RedBeat writes that a run is done before it sends it, and swallows an error of the sending: with a Redis that is full
for a moment, or a beat that dies in between, the run is lost. Here message and schedule are written in one
transaction, by the beat that has the lock and for the run that it has read: a run is sent once, or it is still due,
whenever beat or Redis dies. A run that could not be sent is tried at each tick and sent as soon as Redis takes it,
logged with how late it is. It is sent once and not once for each period that was missed: a periodic task is about
the present, and its next period counts from when it was sent. Limit: what goes to a fanout exchange (a broadcast)
has no place in Redis to wait in, and is published before the transaction.
"""

from __future__ import annotations

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
from redis.exceptions import ConnectionError, LockError, RedisError, TimeoutError, WatchError

from config import Settings
from services.beat import entries
from services.broker.client import format_error
from services.broker.keys import BEAT_LOCK, BEAT_LOCK_SECONDS
from services.broker.outages import Outage
from services.schedule import ENTRIES
from services.supervisor.heartbeat_file import STANDBY, TICKING, WAITING, HeartbeatFile

logger = get_logger(__name__)

# Five looks at the schedule before the lock runs out: one slow command does not lose it.
TICK_SECONDS = 5.0
STANDBY_SECONDS = 2.0
# Redis is back within a second or within minutes; looking each second costs nothing.
RETRY_SECONDS = 1.0
# A run that is later than a busy beat makes it has a story that somebody may look for in the log.
LATE_SECONDS = 2.0
AWAY = (ConnectionError, TimeoutError, OperationalError, OSError)


class LockedScheduler(RedBeatScheduler):  # type: ignore[misc]
    """RedBeat's schedule in Redis, sent by the one beat that holds the lock."""

    def __init__(self, app: Any, **options: Any) -> None:
        settings: Settings = app.settings
        self._heartbeat = HeartbeatFile(settings.stack.run_directory, "beat")
        self._word = ""
        self._written = False
        # Entry → its last run, and the id of the next: the same at each try, so that Flower does not show a task for
        # each of them.
        self._run_ids: dict[str, tuple[Any, str]] = {}
        # Entry → what Redis had of it when it was looked at.
        self._stored: dict[str, Any] = {}
        # Keys of the entries whose time to be looked at had come.
        self._looked_at: set[str] = set()
        # Entry → why its next run could not be sent, at this tick and at the one before.
        self._unsent: dict[str, str] = {}
        self._unsent_before: dict[str, str] = {}
        # Entry → why Redis refused its run at this tick.
        self._refused: dict[str, Exception] = {}
        self._outage = Outage("beat", logger.warning)
        self._held = app.redbeat_redis.lock(BEAT_LOCK, timeout=BEAT_LOCK_SECONDS, thread_local=False)
        super().__init__(app, **options)
        # None switches off RedBeat's own handling of the lock.
        self.lock_key = None

    def setup_schedule(self) -> None:
        """Nothing yet: the schedule is written by the beat that gets the lock."""

    def tick(self, **options: Any) -> float:
        """Send what is due if this beat holds the lock; seconds until the next tick."""
        self._unsent_before, self._unsent, self._refused = self._unsent, {}, {}
        try:
            if not self._hold_lock():
                self._outage.record_recovery()
                self._say(STANDBY)
                return STANDBY_SECONDS
            seconds = super().tick(**options)
        except (*AWAY, RedisError) as error:
            # This tick has not got to all entries: what was said of them is not news at the next.
            self._unsent = self._unsent_before | self._unsent
            return self._wait(error, "the runs that are due")
        if self._refused:
            return self._wait(next(iter(self._refused.values())), ", ".join(sorted(self._refused)))
        self._outage.record_recovery()
        self._say(TICKING)
        return float(min(seconds, TICK_SECONDS))

    def _wait(self, error: Exception, what: str) -> float:
        """Say that Redis does not take `what`; seconds until the next tick."""
        self._outage.record_failure(error, f"Redis at {self.app.settings.broker_url.mask()}", f"take {what}")
        # No heartbeat from one that answers and refuses: that is a fault somebody has to mend.
        if isinstance(error, AWAY):
            self._say(WAITING)
        return RETRY_SECONDS

    # What RedBeat's tick gives maybe_due: a producer, for which it would wait here until Redis is back.
    _maybe_due_kwargs: dict[str, Any] = {}  # noqa: RUF012

    def maybe_due(self, entry: Any, **_: Any) -> float:
        """Send the entry's next run if it is due; seconds until it should be looked at again.

        Raises one of AWAY when Redis is; what else keeps a run from being sent is logged, and keeps no other entry.
        """
        try:
            due, seconds = entry.is_due()
            if due:
                self._send(entry)
            elif entry.key in self._looked_at and not 0 <= entry.score <= to_timestamp(self.app.now()):
                # It has been saved. What is switched off and would be due stays where it is.
                self._commit(entry, entry, [])
        except AWAY:
            raise
        except Exception as error:  # whatever its schedule, its options, a signal's receivers or Redis raise here
            self._report(entry.name, "could not be sent", error)
            return RETRY_SECONDS
        # None, of a schedule that has come to its end.
        return float(seconds or TICK_SECONDS)

    def _send(self, entry: Any) -> None:
        late = _lateness(entry)
        messages = self._messages(entry)
        if self._commit(entry, ScheduleEntry._next_instance(entry), messages):
            logger.info("beat: sent %s (%s)", entry.name, entry.task)
            if late > LATE_SECONDS:
                logger.warning("beat: %s was sent late by %.0f s", entry.name, late)
        # Otherwise another beat has the lock or has sent this run: the next tick will see.

    def _messages(self, entry: Any) -> list[tuple[str, str, int | None]]:
        """The entry's next run: Redis list, message, and milliseconds for which a queue that expires may live."""
        # Nobody else sees the change: RedBeat reads its entries anew at each tick.
        entry.options = {"task_id": self._run_id(entry)} | entry.options | {"retry": False}
        # Denied, or Celery subscribes to the run's result, for which beat never asks: with a Redis of the results that
        # is away, it would not send (celery 5.7).
        with self._collecting() as (producer, collected), denied_join_result():
            try:
                self.apply_async(entry, producer=producer, advance=False)
            except SchedulingError as error:
                raise _unwrapped(error) from None
        return collected

    @contextmanager
    def _collecting(self) -> Iterator[tuple[Any, list[tuple[str, str, int | None]]]]:
        """A producer that declares queues as always, and puts what it publishes into a list."""
        collected: list[tuple[str, str, int | None]] = []
        with self.app.connection_for_write() as connection:
            # Not its default_channel, which waits for Redis without end.
            channel = connection.channel()

            def put(queue: str, message: dict[str, Any], **_: Any) -> None:
                key = channel._q_for_pri(queue, channel._get_message_priority(message, reverse=False))
                collected.append((key, dumps(message), channel._expires.get(queue)))

            # The one method that kombu's virtual transports have for this.
            channel._put = put
            yield self.app.amqp.Producer(channel, auto_declare=False), collected

    def _commit(self, entry: Any, following: Any, messages: list[tuple[str, str, int | None]]) -> bool:
        """Send the run and write down what follows, both or neither; whether that was this beat's to do."""
        with self.app.redbeat_redis.pipeline() as pipe:
            pipe.watch(BEAT_LOCK, entry.key)
            if not self._may_send(pipe, entry):
                return False
            pipe.multi()
            for key, message, expires in messages:
                pipe.lpush(key, message)
                if expires:
                    pipe.pexpire(key, expires)
            # As RedBeat's own _next_instance writes it (celery-redbeat 2.4.2).
            pipe.hset(entry.key, "meta", entries.runs(following))
            pipe.zadd(self.app.redbeat_conf.schedule_key, {entry.key: following.score})
            try:
                pipe.execute()
            except WatchError:
                return False
        return True

    def _may_send(self, pipe: Any, entry: Any) -> bool:
        """Whether this beat still has the lock, and the entry is as it was: it may have stood still since it looked.

        Meanwhile the run may have been sent, or the entry been changed or removed.
        """
        token = self._held.local.token
        holder = pipe.get(BEAT_LOCK)
        stored = pipe.hmget(entry.key, *entries.STORED)
        return bool(token) and holder == token.decode() and stored == self._stored[entry.name]

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
        said = format_error(error)
        if said not in (self._unsent.get(name), self._unsent_before.get(name)):
            logger.error("beat: %s %s (%s); trying at each tick", name, what, said)
        self._unsent[name] = said

    def close(self) -> None:
        """Give the lock to whoever waits for it."""
        try:
            if self._held.local.token:
                self._held.release()
        except RedisError as error:
            logger.warning("beat: the lock could not be released (%s); it runs out in %d s", error, BEAT_LOCK_SECONDS)
        super().close()

    def _hold_lock(self) -> bool:
        """Renew the lock, or take it if it is free; whoever takes it writes the schedule."""
        if self._held.local.token:
            try:
                self._held.extend(BEAT_LOCK_SECONDS, replace_ttl=True)
            except LockError:
                logger.warning("beat: lost the lock: Redis was emptied, or this beat stood still for too long")
                self._held.local.token, self._written = None, False
        if not self._held.local.token and not self._held.acquire(blocking=False):
            return False
        if not self._written:
            logger.info("beat: got the lock, writing the schedule")
            self._write_schedule()
            self._written = True
        return True

    def _write_schedule(self) -> None:
        """Write the code's entries, remove those that it had, and see when the others are due."""
        conf, client = self.app.redbeat_conf, self.app.redbeat_redis
        for name in {*client.smembers(conf.statics_key), *ENTRIES} - conf.schedule.keys():
            entries.remove(self.Entry(name, app=self.app))
            client.srem(conf.statics_key, name)
        for name, definition in conf.schedule.items():
            try:
                entries.write(self._maybe_entry(name, definition))
            except (*AWAY, RedisError):
                raise
            except Exception as error:  # whatever is wrong with the code
                logger.error("beat: the code's entry %s cannot be written (%r)", name, error)
        self._look_sooner()

    def _look_sooner(self) -> None:
        """Correct when entries are due that were saved by another release or in another time zone.

        Only what is too late: what is looked at too soon is sent in time, and somebody may be saving it just now.
        """
        key = self.app.redbeat_conf.schedule_key
        due = {}
        for entry in self._read(self.app.redbeat_redis.zrange(key, 0, -1)):
            try:
                due[entry.key] = entry.score
            except Exception as error:  # whatever its schedule raises
                self._report(entry.name, "could not be sent", error)
        if due := {name: score for name, score in due.items() if score >= 0}:
            self.app.redbeat_redis.zadd(key, due, xx=True, lt=True)

    @property
    def schedule(self) -> dict[str, Any]:
        """The entries that are due, and the one that is next, by which the tick knows how long it may sleep."""
        self._stored = {}
        key, now = self.app.redbeat_conf.schedule_key, to_timestamp(self.app.now())
        with self.app.redbeat_redis.pipeline() as pipe:
            pipe.zrangebyscore(key, 0, now)
            pipe.zrangebyscore(key, f"({now}", now + self.max_interval, start=0, num=1)
            due, following = pipe.execute()
        self._looked_at = set(due)
        found = {entry.name: entry for entry in self._read(due + following)}
        self._run_ids = {name: run for name, run in self._run_ids.items() if name in found}
        return found

    def _read(self, keys: list[str]) -> Iterator[Any]:
        """The entries under these keys; those that cannot be read are reported and left where they are."""
        for key, stored in zip(keys, entries.fetch(self.app.redbeat_redis, keys), strict=True):
            try:
                entry = entries.read(self.app, key, stored)
            except entries.Gone:
                self._forget(key)
            except entries.Broken as broken:
                self._report(key, "cannot be read", broken)
            else:
                self._stored[entry.name] = stored
                yield entry

    def _forget(self, key: str) -> None:
        """Take an entry that is gone out of the order in which entries are due, unless it is there again."""

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


def _unwrapped(error: BaseException) -> BaseException:
    """What Celery, and perhaps kombu inside, have wrapped: it tells whether Redis is away or refuses (celery 5.7)."""
    error = error.__context__ or error
    return error.__cause__ or error if isinstance(error, OperationalError) else error


def _lateness(entry: Any) -> float:
    """Seconds since the entry's next run was due; 0 for one that has never run."""
    left = entry.last_run_at and entry.schedule.remaining_estimate(entry.last_run_at)
    return max(0.0, -left.total_seconds()) if left else 0.0
