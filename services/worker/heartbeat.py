"""Liveness of a node and of beat: a file whose age tells whether the process works, whose word tells what it does.

A heartbeat says that the main loop turns, not merely that the process exists. A Redis outage, a solo task or a
shutdown stop the loop for good reasons and leave the heartbeat fresh. Readers: docker/healthcheck (age), and
services/supervisor/watchdog.py (age, and the word `stuck`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from celery import bootsteps
from celery.concurrency.solo import TaskPool as SoloPool
from celery.utils.log import get_logger
from celery.worker import state as worker_state

from config import Settings
from services.broker import retry
from services.broker.client import answers_ping, connect
from services.delivery import registry

logger = get_logger(__name__)

STARTING = "starting"
READY = "ready"
WAITING = "waiting"
STUCK = "stuck"
TICKING = "ticking"
STANDBY = "standby"

# Often enough for a health check that allows 30 s; one utime() costs microseconds.
BEAT_SECONDS = 2.0
# Whoever starts a node waits for its first word.
FIRST_BEAT_SECONDS = 0.2
# A PING that takes longer than this counts as no answer.
PING_TIMEOUT_SECONDS = 2.0


class HeartbeatFile:
    """The file of one process; written in place, because only its time and its first word are read."""

    def __init__(self, directory: str, name: str) -> None:
        self.path = Path(directory) / f"{name}.heartbeat"
        self._word = ""

    @property
    def usable(self) -> bool:
        """Whether there is a directory to write to; a worker started by hand has none and needs none."""
        return os.access(self.path.parent, os.W_OK)

    def touch(self, word: str) -> None:
        """Say that the process is alive and is `word`."""
        try:
            if word == self._word:
                os.utime(self.path)
            else:
                self.path.write_text(word + "\n")
                self._word = word
        except OSError as error:
            self._word = ""
            logger.error("heartbeat: %s cannot be written (%s)", self.path, error.strerror)


class Liveness:
    """Decides whether a node that was seen at some progress count is alive, waiting or stuck."""

    def __init__(
        self, redis_answers: Callable[[], bool], timeout: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self._redis_answers, self._timeout, self._clock = redis_answers, timeout, clock
        self._progress: object = None
        # When the loop was last seen at work, and since when it has no reason not to be.
        self._seen = self._since = clock()

    def judge(self, progress: object, excused: bool, started: bool) -> str:
        """The node's word: `progress` changes whenever its loop turns, `excused` means it need not turn."""
        now = self._clock()
        if excused or progress != self._progress:
            self._progress, self._seen, self._since = progress, now, now
        if now - self._seen < 2 * BEAT_SECONDS:
            return READY if started else STARTING
        if not self._redis_answers():
            # The loop waits for Redis, perhaps inside a socket time-out: the clock starts when Redis is back.
            self._since = now
            return WAITING
        return STUCK if now - self._since > self._timeout else WAITING


class HeartbeatStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that keeps a node's heartbeat from a thread, which a busy main thread cannot block."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **options: Any) -> None:
        settings: Settings = worker.app.settings
        self.file = HeartbeatFile(settings.stack.run_directory, worker.hostname.partition("@")[0])
        self.enabled = self.file.usable
        self._turns = 0
        self._stop = threading.Event()
        self._liveness = Liveness(_pinger(settings), settings.worker.heartbeat_timeout)
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        self.file.touch(STARTING)
        threading.Thread(target=self._run, args=(worker,), name="heartbeat", daemon=True).start()

    def stop(self, worker: Any) -> None:
        self._stop.set()

    terminate = stop

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        hub.call_soon(self._turn)
        hub.call_repeatedly(1.0, self._turn)

    def _turn(self) -> None:
        self._turns += 1

    def _run(self, worker: Any) -> None:
        while not self._stop.wait(BEAT_SECONDS if self._turns else FIRST_BEAT_SECONDS):
            word = self._liveness.judge(self._progress(worker), _excused(worker), started=self._turns > 0)
            if word != STUCK:
                self.file.touch(word)
            else:
                self._report(worker)

    def _progress(self, worker: Any) -> object:
        # A consumer that reconnects, or fails to, is at work although its loop does not turn.
        consumer = getattr(worker, "consumer", None)
        attempts = getattr(consumer, "broker_connection_retry_attempt", 0)
        return self._turns, getattr(consumer, "restart_count", 0), attempts

    def _report(self, worker: Any) -> None:
        if self.file._word != STUCK:
            logger.critical("heartbeat: the main loop of %s stands still although Redis answers", worker.hostname)
            self.file.touch(STUCK)


def _excused(worker: Any) -> bool:
    """Whether the main thread has a reason not to turn its loop: a shutdown, a solo task, a result to be stored."""
    stopping = worker_state.should_stop is not None or worker_state.should_terminate is not None
    solo = isinstance(getattr(worker, "pool", None), SoloPool)
    # The Redis of the results may be away, or full, while the broker's, which this module asks, answers.
    busy = solo and bool(worker_state.active_requests or registry.find_running())
    return stopping or busy or retry.main_thread_is_waiting()


def _pinger(settings: Settings) -> Callable[[], bool]:
    client = connect(
        settings.broker_url,
        settings,
        socket_timeout=PING_TIMEOUT_SECONDS,
        socket_connect_timeout=PING_TIMEOUT_SECONDS,
    )

    return lambda: answers_ping(lambda: client)
