"""The short form: every fault, each on one pool by turns, against Stalk; and kombu's own transport, which must fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.arena import Plan
from tests.chaos.faults import FAULTS
from tests.chaos.marks import NO_CAUSE
from tests.chaos.run import Outcome, run
from tests.chaos.subjects import POOLS, STALK, STOCK, Subject

# Seconds: three renewals in it have time enough on two busy cores.
LEASE = 4
# A load of three seconds, and of as many more as the fault needs.
COUNT, RATE = 300, 100.0
TURNS = [(fault, POOLS[index % len(POOLS)]) for index, fault in enumerate(FAULTS)]


def outcome(fault: str, pool: str, subject: Subject, directory: Path, times: int = 0) -> Outcome:
    """Run a fault in its short form, or so many times."""
    return run(Plan(fault, pool, subject, LEASE, times or FAULTS[fault].times[0], COUNT, RATE, seed=1), directory)


@pytest.mark.parametrize(("fault", "pool"), TURNS, ids=lambda value: value)
def test_nothing_is_lost_and_nothing_runs_twice_without_a_cause(fault: str, pool: str, tmp_path: Path) -> None:
    found = outcome(fault, pool, STALK, tmp_path)

    assert not found.breaches, found.told()
    assert found.executed == found.sent - len(found.never_kept) - len(found.lost) > 0


# The same operations find what kombu's own transport loses and doubles, so they would find it in Stalk.


def test_stock_loses_what_is_published_in_the_packet_that_cuts_its_consumer_off(tmp_path: Path) -> None:
    found = outcome("kill_clients_with_publish", "prefork", STOCK, tmp_path, times=2)
    assert (found.sent, len(found.lost)) == (2, 2), found


def test_stock_loses_a_task_whose_way_to_the_worker_is_cut(tmp_path: Path) -> None:
    found = outcome("drop_claim_reply", "threads", STOCK, tmp_path)
    # The body of a chord that has lost a part never comes into being.
    assert len([task for task in found.lost if not task.endswith("-body")]) == found.times, found


def test_stock_loses_what_it_has_popped_when_redis_is_full(tmp_path: Path) -> None:
    found = outcome("redis_full_at_pop", "solo", STOCK, tmp_path, times=2)
    assert (found.sent, len(found.lost)) == (2, 2), found


@pytest.mark.parametrize("fault", ["long_task", "long_eta"])
def test_stock_runs_twice_what_takes_longer_than_its_time_out(fault: str, tmp_path: Path) -> None:
    found = outcome(fault, "prefork", STOCK, tmp_path)
    assert found.twice[NO_CAUSE] >= 1, found


def test_stock_runs_twice_what_runs_while_its_connection_is_cut(tmp_path: Path) -> None:
    found = outcome("cut_connections", "threads", STOCK, tmp_path)
    assert found.twice[NO_CAUSE] >= 1, found


def test_stock_runs_twice_what_was_published_without_an_answer(tmp_path: Path) -> None:
    found = outcome("drop_publish_reply", "threads", STOCK, tmp_path)
    assert found.twice[NO_CAUSE] == found.times, found


def test_stock_never_ends_with_poison(tmp_path: Path) -> None:
    found = outcome("poison", "prefork", STOCK, tmp_path)
    assert found.parked == 0
    assert all("goes on" in remark for remark in found.remarks), found
