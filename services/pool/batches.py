"""Tasks with a strategy of their own, which run several messages at once, as those of celery-batches do.

They collect requests and give the pool a list of them, past Celery's own way of a request. Here each delivery in the
list is marked as started, so that it counts when its process dies, and those that have lost their lease are left out.
A delivery is known by its tag: its task may have been redelivered before the strategy forgets the first delivery.
"""

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

# A delivery in a batch: the deliveries that it is one of, and its tag.
BatchedDelivery = tuple[UnackedDeliveries | NoAckDeliveries, str]


class BatchPool:
    """The consumer's pool: it passes all on to the node's pool, and looks into batches before."""

    # After a reconnect the pool goes on with its tasks, and acknowledges them over the next connection. Celery's
    # consumer would flush the pool, and forget them.
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
        """Run the part of a batch that still has its leases, within the time limits of all tasks."""
        batch: list[BatchedDelivery] = []
        args = _filter_leased(args, batch)
        if not batch:
            logger.warning("%r is not run: none of its requests is a delivery that this node has", run)
            return None

        def on_accepted(pid: int, at: float) -> None:
            for deliveries, tag in batch:
                deliveries.start(tag, here=pid == os.getpid())
            if accept_callback:
                accept_callback(pid, at)

        def on_returned(answer: Any) -> None:
            if isinstance(answer, ExceptionInfo):
                on_failed(answer)
            elif callback:
                callback(answer)

        def on_failed(problem: ExceptionInfo) -> None:
            logger.error("a batch of %d tasks ended with an error", len(batch), exc_info=problem.exc_info)
            error = failures.unwrap_error(problem)
            failures.stop_node_for(error)
            for deliveries, tag in batch:
                if isinstance(error, WorkerLostError | TimeLimitExceeded):
                    deliveries.record_crash(tag, f"the process that ran its batch ended: {error!r}")
                else:
                    # As celery-batches does with a batch that fails.
                    deliveries.ack(tag)

        own = Limits(options.pop("timeout", None), options.pop("soft_timeout", None))
        hard, soft = time_limits.add_missing(own, self._general)
        prefork = child_guard.forks(self.wrapped)
        return self.wrapped.apply_async(
            run if prefork else failures.run_in_node,
            args if prefork else (run, *args),
            kwargs,
            accept_callback=on_accepted,
            callback=on_returned,
            error_callback=on_failed,
            soft_timeout=soft,
            timeout=hard,
            **options,
        )


def _filter_leased(arguments: Any, batch: list[BatchedDelivery]) -> Any:
    """The same without requests that have lost their lease; the others are handed to the pool, and added to `batch`."""
    if not isinstance(arguments, list | tuple):
        return arguments
    return type(arguments)(_filter_leased(each, batch) for each in arguments if _hand_over(each, batch))


def _hand_over(argument: Any, batch: list[BatchedDelivery]) -> bool:
    """Hand a request's delivery to the pool. False: its lease was lost, and it must not be run."""
    # Where a request has it; celery-batches copies this from the request.
    properties = (getattr(argument, "request_dict", None) or {}).get("properties")
    if not properties:
        # It is no request.
        return True
    tag = properties["delivery_tag"]
    candidates: list[UnackedDeliveries] | list[NoAckDeliveries] = (
        registry.all_deliveries() if isinstance(tag, Tag) else [NoAckDeliveries()]
    )
    for deliveries in candidates:
        if deliveries.hand_to_pool(tag):
            batch.append((deliveries, tag))
            return True
    # This node has no such delivery any more: whatever the strategy does with it later changes nothing.
    logger.warning("%s is left out of its batch: it was requeued, or its lease was lost", argument.id)
    return False
