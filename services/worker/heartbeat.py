"""A bootstep that writes a node's heartbeat file, and decides what it says of the node.

A heartbeat says that the main loop of the node turns, not merely that the process exists. A Redis outage, a solo task
or a shutdown stop the loop for good reasons; the heartbeat goes on, with another word.
"""

import threading
from collections.abc import Callable
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
from services.supervisor.heartbeat_file import READY, STARTING, STUCK, WAITING, HeartbeatFile

logger = get_logger(__name__)

# Often enough for a health check that allows 30 s; one utime() costs microseconds.
BEAT_SECONDS = 2.0
# Until the node is ready, because whoever starts one waits for it.
FIRST_BEAT_SECONDS = 0.2
# A PING that takes longer than this counts as no answer.
PING_TIMEOUT_SECONDS = 2.0


class Liveness:
    """Decides from the progress of a node's main loop whether the node is starting, ready, waiting or stuck.

    Stuck is a node whose loop has stood still for `timeout` seconds during all of which Redis answered `ping`.
    """

    def __init__(self, ping: Callable[[], bool], timeout: float, clock: Callable[[], float] = monotonic) -> None:
        self._ping, self._timeout, self._clock = ping, timeout, clock
        self._progress: object = None
        # When the loop last turned, and since when its standing still is unexplained.
        self._turned = self._unexplained = clock()

    def judge(self, progress: object, excused: bool, started: bool) -> str:
        """The word for the heartbeat; `progress` differs whenever the loop has turned, `excused`: it need not turn."""
        now = self._clock()
        if excused or progress != self._progress:
            self._progress, self._turned, self._unexplained = progress, now, now
        if now - self._turned < 2 * BEAT_SECONDS:
            return READY if started else STARTING
        if not self._ping():
            # The loop waits for Redis, perhaps inside a socket time-out: the time counts from when Redis is back.
            self._unexplained = now
            return WAITING
        return STUCK if now - self._unexplained > self._timeout else WAITING


class HeartbeatStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Writes the heartbeat from a thread, which a busy main thread does not keep from it."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **options: Any) -> None:
        settings: Settings = worker.app.settings
        self.file = HeartbeatFile(settings.stack.run_directory, worker.hostname.partition("@")[0])
        self.enabled = self.file.usable
        self._turns = 0
        self._stop = threading.Event()
        timeouts = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), PING_TIMEOUT_SECONDS)
        client = connect(settings.broker_url, settings, **timeouts)
        self._liveness = Liveness(lambda: answers_ping(lambda: client), settings.worker.heartbeat_timeout)
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        self.file.touch(STARTING)
        threading.Thread(target=self._run, args=(worker,), name="heartbeat", daemon=True).start()

    def stop(self, worker: Any) -> None:
        self._stop.set()

    terminate = stop

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        hub.call_soon(self._count_turn)
        hub.call_repeatedly(1.0, self._count_turn)

    def _count_turn(self) -> None:
        self._turns += 1

    def _run(self, worker: Any) -> None:
        while not self._stop.wait(BEAT_SECONDS if self._turns else FIRST_BEAT_SECONDS):
            word = self._liveness.judge(self._read_progress(worker), _is_excused(worker), started=self._turns > 0)
            if word == STUCK == self.file.word:
                # A node that is stuck says so once.
                continue
            if word == STUCK:
                logger.critical("heartbeat: the main loop of %s stands still although Redis answers", worker.hostname)
            self.file.touch(word)

    def _read_progress(self, worker: Any) -> object:
        # A consumer that reconnects, or fails to, is at work although its loop does not turn.
        consumer = getattr(worker, "consumer", None)
        attempts = getattr(consumer, "broker_connection_retry_attempt", 0)
        return self._turns, getattr(consumer, "restart_count", 0), attempts


def _is_excused(worker: Any) -> bool:
    """Whether the main thread has a reason not to turn its loop: a shutdown, a solo task, a result to be stored."""
    stopping = worker_state.should_stop is not None or worker_state.should_terminate is not None
    solo = isinstance(getattr(worker, "pool", None), SoloPool)
    # The Redis of the results may be away, or full, while that of the broker answers the ping.
    busy = solo and bool(worker_state.active_requests or registry.find_running())
    return stopping or busy or retry.main_thread_is_waiting()
