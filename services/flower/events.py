"""Celery events: the thread that receives them, and the state they make, kept in a file that survives a kill."""

import logging
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from celery import Celery
from celery.events import EventReceiver
from flower import events
from flower.options import options
from tornado.ioloop import IOLoop

from config import ConfigError
from services.broker.outages import Outage

logger = logging.getLogger(__name__)

# Silence after which Redis is sent a PING, and how many may stay without answer before the connection is given up.
PING_SECONDS = 2
MISSED_PINGS = 5
# The health check says OK while the last reply of Redis is younger than this.
CONNECTED_SECONDS = 5.0
RECONNECT_SECONDS = 2.0
# Events that wait for Flower's loop. When it cannot follow, the receiver stops reading and Redis drops the
# connection at its client-output-buffer-limit: events are lost, memory is not.
MAX_WAITING_EVENTS = 10_000


class Receiver(EventReceiver):  # type: ignore[misc]
    """Receives events, and raises ConnectionError when Redis falls silent.

    kombu looks for that in an event loop only (kombu 5.7).
    """

    last_reply = -inf
    _next_ping = 0.0
    _pubsub: Any = None

    @contextmanager
    def establish_connection(self) -> Iterator[Any]:
        # ConsumerMixin would open a second connection, and retry for ever.
        yield self.connection

    def on_consume_ready(self, connection: Any, channel: Any, consumers: Any, **kwargs: Any) -> None:
        super().on_consume_ready(connection, channel, consumers, **kwargs)
        self._pubsub = channel.subclient

    def on_iteration(self) -> None:
        """Ping Redis when it is silent; called after each event, and every second without one."""
        now = monotonic()
        if not self._pubsub.subscribed:
            return
        if now >= self._next_ping:
            self._next_ping = now + PING_SECONDS
            if self._pubsub.health_check_response_counter >= MISSED_PINGS:
                raise ConnectionError(f"no answer for {PING_SECONDS * MISSED_PINGS} s")
            self._pubsub.check_health()
        if not self._pubsub.health_check_response_counter:
            self.last_reply = now


class Events(events.Events):  # type: ignore[misc]
    """The thread that receives events, and the state of tasks and workers that they make."""

    def __init__(self, capp: Celery, io_loop: IOLoop, broker: str = "") -> None:
        self._file = StateFile(options.db)
        self._receiver: Receiver | None = None
        self._outage = Outage("events", logger.warning)
        self._broker = broker
        self._waiting = threading.BoundedSemaphore(MAX_WAITING_EVENTS)
        self._unsaved = False
        self._warned_of_slow_saves = False
        # When an event came last from each worker, and from each process that sends tasks.
        self.last_seen: dict[str, float] = {}
        super().__init__(
            capp,
            io_loop,
            db=options.db,
            persistent=options.persistent,
            state_save_interval=options.state_save_interval,
            enable_events=options.enable_events,
            max_tasks_in_memory=options.max_tasks,
            max_workers_in_memory=options.max_workers,
        )
        # For a state that was read back Flower sets the limit on tasks, and not this one (flower 2.2).
        self.state.max_workers_in_memory = self.state.workers.limit = options.max_workers
        self.state.workers.update()

    @property
    def is_connected(self) -> bool:
        """Whether events can arrive now."""
        receiver = self._receiver
        return receiver is not None and monotonic() - receiver.last_reply < CONNECTED_SECONDS

    def run(self) -> None:
        """Receive events for ever; Flower's own loop doubles its delay after each failure, without a limit."""
        while True:
            try:
                self._receive()
            except Exception as error:
                where = f"Redis at {self._broker}"
                self._outage.record_failure(error, where, "send events, which are missed until then")
            self._receiver = None
            sleep(RECONNECT_SECONDS)

    def _receive(self) -> None:
        with self.capp.connection_for_read() as connection:
            connection.connect()
            self._outage.record_recovery()
            self._receiver = Receiver(connection, handlers={"*": self.on_event}, app=self.capp)
            self._receiver.capture(limit=None, timeout=None, wakeup=True)

    def on_event(self, event: dict[str, Any]) -> None:
        """Hand an event to Flower's loop; block while MAX_WAITING_EVENTS wait for it."""
        self._waiting.acquire()
        self.io_loop.add_callback(self._apply, event)

    def _apply(self, event: dict[str, Any]) -> None:
        self._waiting.release()
        self._unsaved = self._unsaved or event["type"] != "worker-heartbeat"
        self.last_seen[event["hostname"]] = monotonic()
        self.state.event(event)

    def find_offline(self, inspected: set[str]) -> set[str]:
        """Return the names to forget: offline for too long, and the longest offline where there are too many.

        `inspected` are further names that Flower knows.
        """
        now, state = monotonic(), self.state
        # Of workers read back from the file, the last heartbeat tells which has been offline for longer.
        for name in sorted({*state.workers, *state.counter, *inspected}, key=self._get_last_heartbeat):
            self.last_seen.setdefault(name, now)
        names = sorted(self.last_seen, key=self.last_seen.__getitem__)
        excess = set(names[: max(0, len(names) - options.max_workers)])
        expired = {name for name in names if now - self.last_seen[name] >= options.purge_offline_workers}
        return (excess | expired).difference(self.list_alive())

    def _get_last_heartbeat(self, name: str) -> float:
        """The time of a worker's last heartbeat by its own clock; 0 when there is none."""
        worker = self.state.workers.data.get(name)
        return max(worker.heartbeats, default=0.0) if worker else 0.0

    def list_alive(self) -> list[str]:
        """The names of workers whose heartbeats come."""
        return [name for name, worker in self.state.workers.data.items() if worker.alive]

    def forget(self, names: set[str]) -> None:
        """Remove every trace of `names`, apart from the tasks that they ran."""
        state = self.state
        for name in names:
            for mapping in (self.last_seen, state.workers, state.counter):
                mapping.pop(name, None)
            if name in state.tasks_by_worker and not state.tasks_by_worker[name]:
                del state.tasks_by_worker[name]
        state.metrics.remove_workers(names)

    def load_state(self) -> events.EventsState | None:
        """Read the state that the last Flower saved; None without one. An unreadable file is moved aside."""
        return self._file.load()

    def save_state(self) -> None:
        """Write the state, if it has changed."""
        if not self._unsaved:
            return
        started = monotonic()
        try:
            self._file.save(self.state)
            self._unsaved = False
        except Exception as error:
            logger.error("%s cannot be saved (%r): a restart now loses the last tasks", self._file.path, error)
        self._warn_of_slow_saves(monotonic() - started)

    def _warn_of_slow_saves(self, seconds: float) -> None:
        """Warn, once, when saving takes so long that pages become slow."""
        if seconds * 1000 > self.state_save_interval / 10 and not self._warned_of_slow_saves:
            self._warned_of_slow_saves = True
            logger.warning(
                "saving takes %.1f s, every %d s: lower FLOWER_MAX_TASKS or raise FLOWER_STATE_SAVE_INTERVAL",
                seconds,
                self.state_save_interval / 1000,
            )


class StateFile:
    """The file with Flower's state, replaced as a whole: Flower's own is left half written by a kill."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._new = self.path.with_name(f"{self.path.name}.new")

    def check_writable(self) -> None:
        """Raise ConfigError when the state could not be saved."""
        try:
            self._write(b"")
            self._new.unlink()
        except OSError as error:
            problem = f"Flower cannot write there ({error.strerror}); make its directory writable for this user"
            raise ConfigError([f"{self.path}: {problem}"]) from None

    def load(self) -> events.EventsState | None:
        """Read the state; None without a file, or with one that cannot be read, which is moved aside."""
        try:
            state, counter = pickle.loads(self.path.read_bytes())  # noqa: S301 - our own file
            state.counter.update(counter)
            return state
        except FileNotFoundError:
            return None
        except Exception as error:
            aside = self.path.replace(f"{self.path}.unreadable")
            logger.error("%s cannot be read (%r): starting empty, the file is now %s", self.path, error, aside)
            return None

    def save(self, state: events.EventsState) -> None:
        """Replace the file."""
        self._write(pickle.dumps((state, dict(state.counter))))
        self._new.replace(self.path)

    def _write(self, content: bytes) -> None:
        """Write to the disk itself, readable by the owner only: tasks' arguments may be secret."""
        with open(self._new, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
