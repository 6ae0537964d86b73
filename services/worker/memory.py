"""Memory: a node that runs for months stays as large as it was, and outlives a task that takes more than there is."""

from __future__ import annotations

import gc
import heapq
from pathlib import Path
from typing import Any

from billiard import current_process
from celery import bootsteps, signals
from celery.utils.log import get_logger
from celery.worker import components
from kombu.asynchronous import timer as kombu_timer

logger = get_logger(__name__)

# So few are not worth a look.
LEAST_ENTRIES = 1000
# When the kernel looks for the largest process to kill, a child counts for as much more than it has: thousandths of the
# container's memory, or of the host's where there is no limit. Its parent has 12 MB more than a new child, and the
# messages of all of them; a fifth of a small container of 256 MB is 51. With much more, a parent that has become too
# large itself would stay, and all its children would be killed in vain.
CHILD_OOM_SCORE_ADJ = 200
LARGEST_OOM_SCORE_ADJ = 1000
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


class Timer(kombu_timer.Timer):  # type: ignore[misc]
    """kombu's timer, without what has been cancelled.

    A prefork node sets a timer for the time limit of each task and cancels it at the task's end. kombu's timer keeps
    it until it would have been due (kombu 5.7): at 500 tasks a second and a limit of half an hour 900,000 of them.
    As asyncio does, everything cancelled is dropped whenever the heap has doubled, which costs nothing on average.
    It belongs to the thread of the event loop: what another thread entered in that moment would be lost.
    """

    _look_at = LEAST_ENTRIES

    def _enter(self, eta: float, priority: int, entry: Any, push: Any = heapq.heappush) -> Any:
        entered = super()._enter(eta, priority, entry, push)
        if len(self._queue) >= self._look_at:
            # In place: the loop's iterator has this list.
            self._queue[:] = [each for each in self._queue if not each.entry.canceled]
            heapq.heapify(self._queue)
            self._look_at = max(LEAST_ENTRIES, 2 * len(self._queue))
        return entered


class TimerStep(bootsteps.Step):  # type: ignore[misc]
    """Bootstep that gives a node with an event loop this timer; Celery's setting chooses only those without one."""

    requires = (components.Hub,)

    def include_if(self, worker: Any) -> bool:
        return bool(worker.use_eventloop)

    def create(self, worker: Any) -> None:
        # Nothing has been entered yet: that begins when the steps start.
        worker.timer = worker.hub.timer = Timer(max_interval=10.0)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def go_first(**_: Any) -> None:
    """In a child of a prefork pool: be killed for want of memory before the node, which runs the others' tasks too.

    Kills of the node count as a start of each task that it runs, the kill of a child as one of its own. A process
    that the task starts inherits it. Everybody may raise his own value; nobody needs a capability.
    """
    # A solo pool sends this signal in the node itself.
    if current_process().name == "MainProcess":
        return
    try:
        raised = min(LARGEST_OOM_SCORE_ADJ, int(OOM_SCORE_ADJ.read_text()) + CHILD_OOM_SCORE_ADJ)
        OOM_SCORE_ADJ.write_text(f"{raised}\n")
    except FileNotFoundError:
        # Not Linux.
        return
    except OSError as error:
        logger.warning("memory: %s cannot be written (%s): without memory the node may die", OOM_SCORE_ADJ, error)


class FreezeStep(bootsteps.Step):  # type: ignore[misc]
    """Bootstep that takes what has been loaded so far out of the garbage collector's sight, before the pool forks.

    A collection writes to each object that it looks at, so that a child would get a copy of all that it shares with
    its parent. And there is less to look at in every pool.
    """

    def create(self, worker: Any) -> None:
        # All steps are created before any of them starts. What is garbage already would stay for ever.
        gc.collect()
        gc.freeze()
