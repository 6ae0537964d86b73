"""A child of a prefork pool starts a task only while its lease lasts.

A task may lie in the pipe to a child while the whole node stands still; another node has run it by the time that they
move again, and the child may be the first to do so. So it looks at the table of leases first, which it shares with its
parent (delivery/shared_leases.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Reject

from services.delivery.no_ack import NoAckDeliveries
from services.delivery.shared_leases import SharedLeaseTable
from services.delivery.unacked import UnackedDeliveries, clock
from services.pool.failures import run_here


class LeaseRanOut(Reject):  # type: ignore[misc]
    """A child has not started a task, because another node may have it by now. Celery requeues it."""


class _Shared:
    """The table of this process's worker; children find it here because they are forked."""

    table: SharedLeaseTable | None = None


def create_table() -> None:
    """Make a table for the worker that begins in this process."""
    _Shared.table = SharedLeaseTable()


def forks(pool: Any) -> bool:
    """Whether a pool has children: prefork's, also as a consumer has it (batches.py)."""
    return isinstance(getattr(pool, "wrapped", pool), TaskPool)


def guard(pool: Any, deliveries: UnackedDeliveries | NoAckDeliveries, tag: str) -> tuple[Any, ...]:
    """What a pool is to run in front of a task: a function, and its first arguments."""
    if not forks(pool):
        return (run_here,)
    if _Shared.table is None or isinstance(deliveries, NoAckDeliveries):
        return ()
    return start_if_leased, deliveries.share_lease(tag, _Shared.table)


def start_if_leased(number: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """In a child: run a task unless its lease has run out. Returns what Celery's `run` does for it."""
    # A child that was spawned, not forked, has no such table.
    if _Shared.table is None or clock() < _Shared.table.until(number):
        return run(*arguments)
    try:
        raise LeaseRanOut(requeue=True)
    except LeaseRanOut:
        return 1, ExceptionInfo(), 0.0
