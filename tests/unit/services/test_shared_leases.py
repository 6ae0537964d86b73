"""The table in which children read until when the lease of a delivery lasts."""

import os
from collections.abc import Callable, Sequence

import pytest
from billiard.einfo import ExceptionInfo
from redis import Redis

from services.delivery.leases import Leases
from services.delivery.shared_leases import NEVER, NOTHING, SLOTS, SharedLeaseTable
from services.delivery.unacked import Rules, UnackedDeliveries, clock
from services.pool import child_guard

LEASE = 60
OURS = "it ran"


class LeasesByHand(Leases):
    """Leases that Redis has lost when the test says so."""

    lost: tuple[str, ...] = ()

    def renew(self, started: Sequence[str], others: Sequence[str]) -> list[str]:
        return [tag for tag in (*started, *others) if tag in self.lost]


def claim(*tags: str, since: float) -> UnackedDeliveries:
    """Deliveries that were claimed at `since`, and that the pool has."""
    rules = Rules(LEASE, max_deliveries=5, visibility_timeout=3600, priority_steps=(0,))
    deliveries = UnackedDeliveries(rules, LeasesByHand(Redis(), LEASE))
    deliveries.add(tags, 1, since)
    for tag in tags:
        assert deliveries.hand_to_pool(tag)
    return deliveries


def test_a_child_reads_what_its_parent_writes_after_the_fork() -> None:
    table = SharedLeaseTable()
    slot = table.add(1.0)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.read(reader, 1)
        os._exit(0 if table.until(slot.number) == 2.0 else 1)
    slot.set(2.0)
    os.write(writer, b"!")
    os.close(writer)
    os.close(reader)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_lease_that_was_cleared_or_never_added_is_nobodys() -> None:
    table = SharedLeaseTable()
    slot = table.add(1.0)
    slot.clear()

    assert [table.until(number) for number in (slot.number, NOTHING, 7)] == [NEVER] * 3


def test_a_slot_that_another_delivery_has_taken_is_not_read_or_written_by_the_first() -> None:
    table = SharedLeaseTable()
    first = table.add(1.0)
    *_, last = [table.add(float(number)) for number in range(2, SLOTS + 2)]
    first.set(1e9)

    assert table.until(first.number) == NEVER
    assert table.until(last.number) == SLOTS + 1


def test_each_lease_lasts_from_its_claim_and_is_renewed_by_itself() -> None:
    table, now = SharedLeaseTable(), clock()
    # The node was idle before, or has not renewed anything since Redis came back.
    deliveries = claim("early", "late", since=now - LEASE / 2)
    early, late = deliveries.share_lease("early", table), deliveries.share_lease("late", table)
    assert [table.until(number) for number in (early, late)] == [now + LEASE / 2] * 2

    deliveries.start("early")
    deliveries.requeue(["late"])
    deliveries.renew()
    assert table.until(early) >= now + LEASE
    assert table.until(late) == NEVER


def lose(deliveries: UnackedDeliveries) -> None:
    deliveries.leases.lost = ("tag",)  # type: ignore[attr-defined]
    deliveries.renew()


@pytest.mark.parametrize(
    "end",
    [lose, lambda deliveries: deliveries.requeue(["tag"]), UnackedDeliveries.requeue_all],
    ids=["lost", "requeued", "all-requeued"],
)
def test_a_delivery_that_is_lost_or_requeued_has_no_lease(end: Callable[[UnackedDeliveries], object]) -> None:
    table, deliveries = SharedLeaseTable(), claim("tag", since=clock())
    number = deliveries.share_lease("tag", table)
    end(deliveries)

    assert table.until(number) == NEVER
    assert deliveries.share_lease("tag", table) == NOTHING


def test_a_child_starts_what_has_a_lease_and_has_celery_requeue_the_rest() -> None:
    child_guard.create_table()
    table = child_guard._Shared.table
    assert table
    ours, overdue = table.add(clock() + LEASE), table.add(clock() - 1)

    assert child_guard.start_if_leased(ours.number, str.upper, OURS) == OURS.upper()
    failed, how, _ = child_guard.start_if_leased(overdue.number, str.upper, OURS)
    assert failed and isinstance(how, ExceptionInfo)
    assert how.exception.exc.requeue is True
