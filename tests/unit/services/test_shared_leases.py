"""The board on which children read until when a delivery is ours."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from billiard.einfo import ExceptionInfo

from services.delivery.shared_leases import NEVER, NOTHING, PLACES, Board
from services.delivery.unacked import Holder, Rules, clock
from services.pool import child_guard

LEASE = 60
OURS = "it ran"


def holder_of(*tags: str, since: float) -> Holder:
    """A holder that has handed over what it claimed at `since`."""
    holder = Holder(Rules(LEASE, max_deliveries=5, visibility_timeout=3600, priority_steps=(0,)))
    holder.hold(tags, 1, since)
    for tag in tags:
        assert holder.hand_over(tag)
    return holder


def test_a_child_reads_what_its_parent_writes_after_the_fork() -> None:
    board = Board()
    notice = board.put_up(1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.read(reader, 1)
        os._exit(0 if board.until(notice.number) == 2.0 else 1)
    notice.change(2.0)
    os.write(writer, b"!")
    os.close(writer)
    os.close(reader)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_taken_down_or_was_never_put_up_is_nobodys() -> None:
    board = Board()
    notice = board.put_up(1.0)
    notice.take_down()

    assert [board.until(number) for number in (notice.number, NOTHING, 7)] == [NEVER] * 3


def test_a_place_that_another_delivery_has_taken_says_nothing_of_the_first_and_hears_nothing_from_it() -> None:
    board = Board()
    first = board.put_up(1.0)
    *_, last = [board.put_up(float(number)) for number in range(2, PLACES + 2)]
    first.change(1e9)

    assert board.until(first.number) == NEVER
    assert board.until(last.number) == PLACES + 1


def test_each_delivery_is_ours_from_its_claim_and_renewed_by_itself() -> None:
    board, now = Board(), clock()
    # The node was idle before, or its keeper has not renewed anything since Redis came back.
    holder = holder_of("early", "late", since=now - LEASE / 2)
    early, late = holder.show("early", board), holder.show("late", board)
    assert [board.until(number) for number in (early, late)] == [now + LEASE / 2] * 2

    holder.renewed(["early"], [], now)
    assert [board.until(number) for number in (early, late)] == [now + LEASE, now + LEASE / 2]


@pytest.mark.parametrize(
    "end",
    [
        lambda holder: holder.renewed(["tag"], ["tag"], clock()),
        lambda holder: holder.give_back(["tag"]),
        lambda holder: holder.release_all(),
    ],
    ids=["lost", "given-back", "released"],
)
def test_a_delivery_that_is_lost_or_given_back_is_not_ours(end: Callable[[Holder], object]) -> None:
    board, holder = Board(), holder_of("tag", since=clock())
    number = holder.show("tag", board)
    end(holder)

    assert board.until(number) == NEVER
    assert holder.show("tag", board) == NOTHING


def test_a_child_starts_what_is_ours_and_has_celery_give_back_the_rest() -> None:
    child_guard.prepare()
    board = child_guard._Shared.board
    assert board
    ours, overdue = board.put_up(clock() + LEASE), board.put_up(clock() - 1)

    assert child_guard.start_if_ours(ours.number, str.upper, OURS) == OURS.upper()
    failed, how, _ = child_guard.start_if_ours(overdue.number, str.upper, OURS)
    assert failed and isinstance(how, ExceptionInfo)
    assert how.exception.exc.requeue is True
