"""Memory: a node that runs for months stays as large as after its first minutes."""

from __future__ import annotations

import gc
import heapq
from typing import Any

from celery import bootsteps
from celery.worker import components
from kombu.asynchronous import timer as kombu_timer

# So few are not worth a look.
LEAST_ENTRIES = 1000


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


def install() -> None:
    """Have nodes use this timer.

    Their bootstep makes it by this name, and a setting chooses only those without an event loop (celery 5.7).
    """
    components._Timer = Timer


class FreezeStep(bootsteps.Step):  # type: ignore[misc]
    """Bootstep that takes what has been loaded so far out of the garbage collector's sight, before the pool forks.

    A collection writes to each object that it looks at, so that a child would get a copy of all that it shares with
    its parent. And there is less to look at in every pool.
    """

    def create(self, worker: Any) -> None:
        # All steps are created before any of them starts. What is garbage already would stay for ever.
        gc.collect()
        gc.freeze()
