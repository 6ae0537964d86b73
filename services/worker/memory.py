"""Memory: a node that runs for months does not grow, and survives a task that takes more memory than there is."""

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

# With fewer a search is not worth its time.
MIN_ENTRIES = 1000
# The kernel kills the largest process, and adds this to a child's size: thousandths of the container's memory, or of
# the host's where there is no limit. Its parent has 12 MB more than a new child, and the messages of all of them; a
# fifth of a small container of 256 MB is 51. With much more, a parent that has become too large itself would survive,
# and all its children would be killed in vain.
CHILD_OOM_SCORE_ADJ = 200
LARGEST_OOM_SCORE_ADJ = 1000
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


class Timer(kombu_timer.Timer):  # type: ignore[misc]
    """kombu's timer without the entries that were cancelled.

    A prefork node sets a timer for the time limit of each task and cancels it at the task's end. kombu's timer keeps
    it until it would have been due (kombu 5.7): at 500 tasks a second and a limit of half an hour 900,000 of them.
    As in asyncio, all cancelled entries are dropped whenever the heap has doubled, which costs nothing on average.
    Only the thread of the event loop may use it: an entry of another thread could be lost meanwhile.
    """

    _drop_at = MIN_ENTRIES

    def _enter(self, eta: float, priority: int, entry: Any, push: Any = heapq.heappush) -> Any:
        entered = super()._enter(eta, priority, entry, push)
        if len(self._queue) >= self._drop_at:
            # In place, because the loop's iterator has this list.
            self._queue[:] = [each for each in self._queue if not each.entry.canceled]
            heapq.heapify(self._queue)
            self._drop_at = max(MIN_ENTRIES, 2 * len(self._queue))
        return entered


class TimerStep(bootsteps.Step):  # type: ignore[misc]
    """Bootstep that gives a node with an event loop this timer; Celery's setting works only without an event loop."""

    requires = (components.Hub,)

    def include_if(self, worker: Any) -> bool:
        return bool(worker.use_eventloop)

    def create(self, worker: Any) -> None:
        # The timer is empty until the steps start.
        worker.timer = worker.hub.timer = Timer(max_interval=10.0)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def raise_oom_score(**_: Any) -> None:
    """Have the kernel kill a child of a prefork pool before the node when memory runs out.

    When the node dies, that counts as a start of each task in its pool; when a child dies, only of its own task. A
    process that the task starts inherits the value. Raising it needs no capability.
    """
    # A solo pool sends this signal in the node's own process.
    if current_process().name == "MainProcess":
        return
    try:
        score = min(LARGEST_OOM_SCORE_ADJ, int(OOM_SCORE_ADJ.read_text()) + CHILD_OOM_SCORE_ADJ)
        OOM_SCORE_ADJ.write_text(f"{score}\n")
    except FileNotFoundError:
        # Not Linux.
        return
    except OSError as error:
        logger.warning("memory: %s cannot be written (%s): without memory the node may die", OOM_SCORE_ADJ, error)


class FreezeStep(bootsteps.Step):  # type: ignore[misc]
    """Bootstep that excludes what has been loaded so far from garbage collection, before the pool forks.

    A collection writes to each object that it looks at, so that a child would get a copy of all that it shares with its
    parent. In every pool a collection has less to look at.
    """

    def create(self, worker: Any) -> None:
        # All steps are created before any of them starts. Collected first, because frozen garbage would stay for ever.
        gc.collect()
        gc.freeze()
