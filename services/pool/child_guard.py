"""What a child of a prefork pool is given, it starts only while it is still ours.

A task may lie in the pipe to a child while the whole node stands still; somebody else has run it by the time they
move again, and the child may be the first of them. Before it starts a task it looks at the board (board.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.prefork import TaskPool
from celery.exceptions import Reject

from services.delivery.no_ack import Unleased
from services.delivery.shared_leases import Board
from services.delivery.unacked import Holder, clock
from services.pool.failures import run_here


class LeaseRanOut(Reject):  # type: ignore[misc]
    """A child has not started a task, because somebody else may have it by now. Celery gives it back."""


class _Shared:
    """The board of this process's worker; children find it here because they are forked."""

    board: Board | None = None


def prepare() -> None:
    """Make a board for the worker that begins in this process."""
    _Shared.board = Board()


def guard(pool: Any, holder: Holder | Unleased, tag: str) -> tuple[Any, ...]:
    """What a pool is to run in front of a task: a function, and its first arguments."""
    if not isinstance(pool, TaskPool):
        return (run_here,)
    if _Shared.board is None or isinstance(holder, Unleased):
        return ()
    return start_if_ours, holder.show(tag, _Shared.board)


def start_if_ours(number: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """In a child: run a task unless its lease has run out. Returns what Celery's `run` does for it."""
    # A child that was spawned, not forked, has no board to look at.
    if _Shared.board is None or clock() < _Shared.board.until(number):
        return run(*arguments)
    try:
        raise LeaseRanOut(requeue=True)
    except LeaseRanOut:
        return 1, ExceptionInfo(), 0.0
