"""Soft shutdown: tasks that still run WORKER_SOFT_SHUTDOWN after a warm shutdown began are requeued, in every pool.

That is so for TERM, `celery control shutdown`, HUP, and a task that raises WorkerShutdown.

Celery's own soft shutdown sleeps its whole length even when the tasks have long finished, and loses the task of a solo
pool (celery 5.7). Here TERM is a plain warm shutdown, which ends as soon as the tasks have, and a timer bounds it.
"""

import os
import signal
import sys
import threading
from typing import Any

from celery import bootsteps
from celery.concurrency.prefork import _run_ready_callbacks
from celery.platforms import EX_OK
from celery.signals import worker_shutting_down
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.control import control_command, ok

from services.broker import retry
from services.delivery import registry

logger = get_logger(__name__)


class SoftShutdownStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Bootstep that bounds a warm shutdown by WORKER_SOFT_SHUTDOWN."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        self._worker = worker
        self._timer: threading.Timer | None = None
        super().__init__(worker, **options)

    def create(self, worker: Any) -> None:
        worker_shutting_down.connect(self._on_shutdown, weak=False)

    def _on_shutdown(self, how: str, **_: Any) -> None:
        # This is a signal handler, and may only start the timer.
        if how == "Warm":
            self._start_timer()

    def stop(self, worker: Any) -> None:
        # Before the pool waits for its tasks. HUP, or a task that stops its node, sends no worker_shutting_down.
        self._start_timer()

    def _start_timer(self) -> None:
        if self._timer:
            return
        seconds = self._worker.app.settings.worker.soft_shutdown
        self._timer = threading.Timer(seconds, requeue_and_exit, (self._worker,))
        self._timer.daemon = True
        self._timer.start()


@control_command()  # type: ignore[untyped-decorator]
def shutdown(state: Any, msg: str = "Got shutdown from remote", **_: Any) -> Any:
    """Shutdown worker(s), as TERM does.

    Celery's own raises WorkerShutdown: no answer is sent, and the heartbeat takes a node that waits for its tasks for
    one that stands still (celery 5.7).
    """
    logger.warning(msg)
    worker_shutting_down.send(sender=state.hostname, sig="SIGTERM", how="Warm", exitcode=EX_OK)
    worker_state.should_stop = EX_OK
    return ok("running tasks finish, then the node ends")


def requeue_and_exit(worker: Any) -> None:
    """Stop the tasks that still run, requeue all messages that this node has, and end the process."""
    if worker.blueprint.shutdown_complete.is_set():
        # The worker has ended, and its process goes on: a program may run a worker inside, as tests do.
        return
    running, tags = tuple(worker_state.active_requests), registry.find_running()
    if not running and not tags and not retry.main_thread_is_waiting():
        # The last task has ended just now, and the main thread ends the process.
        return
    _kill_children(worker)
    if worker.hub:
        # Acknowledgements that wait for the main loop, which has stopped.
        _run_ready_callbacks(worker.hub)
    for request in running:
        fate = "had been acknowledged and is lost" if request.acknowledged else "goes back to its queue"
        logger.warning("shutdown: %s[%s] still ran and %s", request.name, request.id, fate)
    if batched := tags.difference(request.tag for request in running):
        logger.warning("shutdown: %d tasks still ran in batches and go back to their queues", len(batched))
    try:
        if registry.close():
            worker.requeue_rate_limited()
        else:
            logger.error("shutdown: Redis does not answer; its messages are requeued when their leases run out")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread is in the middle of a task, perhaps the main thread: only this ends it.
        os._exit(worker.exitcode or EX_OK)


def _kill_children(worker: Any) -> None:
    """Kill the children of a prefork pool, so that no task goes on while it runs again elsewhere."""
    pool = getattr(worker.pool, "_pool", None)
    for child in list(getattr(pool, "_pool", None) or ()):
        try:
            os.kill(child.pid, signal.SIGKILL)
        except (ProcessLookupError, AttributeError):
            continue
