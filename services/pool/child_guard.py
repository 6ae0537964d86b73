"""A child of a prefork pool starts a task only while its lease lasts.

A task may be in the pipe to a child while the whole node stands still. Another node may have run it by the time that
they move again, and the child may move before its parent. So the child first reads the table of leases, which it shares
with its parent (services/delivery/shared_leases.py).
"""

from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Reject

from services.delivery.no_ack import NoAckDeliveries
from services.delivery.shared_leases import SharedLeaseTable
from services.delivery.unacked import UnackedDeliveries, clock
from services.pool.failures import run_in_node


class LeaseExpired(Reject):  # type: ignore[misc]
    """A child has not started a task, because another node may have it by now. Celery requeues it."""


class _Shared:
    """The table of this process's worker, which children inherit when they are forked."""

    table: SharedLeaseTable | None = None


def create_table() -> None:
    """Create the table for a worker in this process, before its pool forks."""
    _Shared.table = SharedLeaseTable()


def forks(pool: Any) -> bool:
    """Whether a pool, or the pool in a BatchPool (batches.py), is prefork's and has children."""
    return isinstance(getattr(pool, "wrapped", pool), TaskPool)


def get_runner(pool: Any, deliveries: UnackedDeliveries | NoAckDeliveries, tag: str) -> tuple[Any, ...]:
    """The function by which a pool has to run a task, and its first arguments; nothing where it needs none."""
    if not forks(pool):
        return (run_in_node,)
    if _Shared.table is None or isinstance(deliveries, NoAckDeliveries):
        return ()
    return start_if_leased, deliveries.share_lease(tag, _Shared.table)


def start_if_leased(number: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a child, unless its lease has run out. Returns what Celery's `run` returns for it."""
    # A child that was spawned, and not forked, has no such table.
    if _Shared.table is None or clock() < _Shared.table.until(number):
        return run(*arguments)
    try:
        raise LeaseExpired(requeue=True)
    except LeaseExpired:
        return 1, ExceptionInfo(), 0.0
