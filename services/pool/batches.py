"""Tasks with a strategy of their own, which run several messages at once, as those of celery-batches do.

They keep requests back and give the pool a list of them, past Celery's own way of a request. Here each of the list is
noted as started, so that a batch counts when its process dies over it, and what has lost its lease is left out.
A delivery is known by its tag: its task may have come again, as another one, before the strategy forgets the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.utils.log import get_logger

from services.delivery import registry
from services.delivery.claim import Tag
from services.delivery.no_ack import NoAckDeliveries
from services.delivery.unacked import UnackedDeliveries
from services.pool import child_guard, failures, time_limits
from services.pool.time_limits import Limits

logger = get_logger(__name__)

# A delivery that is handed over: who holds it, and its tag.
HandedOver = tuple[UnackedDeliveries | NoAckDeliveries, str]


class BatchPool:
    """The pool as a consumer has it, and from it the tasks with a strategy of their own."""

    # The pool goes on with its tasks through a reconnect, and acknowledges them over the next connection: Celery's
    # consumer would flush it, and forget them.
    flush = None

    def __init__(self, pool: Any, general: Limits) -> None:
        self.wrapped, self._general = pool, general

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def apply_async(
        self,
        run: Callable[..., Any],
        args: Any = (),
        kwargs: Any = None,
        accept_callback: Callable[..., Any] | None = None,
        callback: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """Run a batch without what is not ours any more, within the time limits of all tasks."""
        batch: list[HandedOver] = []
        args = _with_lease(args, batch)
        if not batch:
            logger.warning("%r is not run: nothing that it is given has the tag of a delivery that is held here", run)
            return None

        def accepted(pid: int, at: float) -> None:
            for deliveries, tag in batch:
                deliveries.start(tag, here=pid == os.getpid())
            if accept_callback:
                accept_callback(pid, at)

        def returned(answer: Any) -> None:
            if isinstance(answer, ExceptionInfo):
                failed(answer)
            elif callback:
                callback(answer)

        def failed(problem: ExceptionInfo) -> None:
            logger.error("a batch of %d tasks ended with an error", len(batch), exc_info=problem.exc_info)
            error = failures.error_of(problem)
            failures.stop_node_for(error)
            for deliveries, tag in batch:
                if isinstance(error, WorkerLostError | TimeLimitExceeded):
                    deliveries.record_crash(tag, f"the process that ran its batch ended: {error!r}")
                else:
                    # As celery-batches does with a batch that fails.
                    deliveries.ack(tag)

        own = Limits(options.pop("timeout", None), options.pop("soft_timeout", None))
        hard, soft = time_limits.complete(own, self._general)
        prefork = child_guard.forks(self.wrapped)
        return self.wrapped.apply_async(
            run if prefork else failures.run_here,
            args if prefork else (run, *args),
            kwargs,
            accept_callback=accepted,
            callback=returned,
            error_callback=failed,
            soft_timeout=soft,
            timeout=hard,
            **options,
        )


def _with_lease(found: Any, batch: list[HandedOver]) -> Any:
    """The same without requests that have lost their lease; the others are handed to the pool, and in `batch`."""
    if not isinstance(found, list | tuple):
        return found
    return type(found)(_with_lease(each, batch) for each in found if _is_with_lease(each, batch))


def _is_with_lease(each: Any, batch: list[HandedOver]) -> bool:
    # A request has it here, and celery-batches copies this from it.
    properties = (getattr(each, "request_dict", None) or {}).get("properties")
    if not properties:
        # It is no request.
        return True
    tag = properties["delivery_tag"]
    ours: list[UnackedDeliveries] | list[NoAckDeliveries] = (
        registry.all_deliveries() if isinstance(tag, Tag) else [NoAckDeliveries()]
    )
    for deliveries in ours:
        if deliveries.hand_to_pool(tag):
            batch.append((deliveries, tag))
            return True
    # Nobody holds it here: whatever its strategy says of it later changes nothing.
    logger.warning("%s is left out of its batch: it was requeued, or its lease was lost", each.id)
    return False
