"""The short form: every fault, each on one pool by turns, against Stalk; and kombu's own transport, which must fail."""

from pathlib import Path

import pytest

from tests.chaos.event_log import NO_CAUSE
from tests.chaos.faults import FAULTS
from tests.chaos.faults.nodes import DELIVERIES, POISONS
from tests.chaos.faults.packet import NOBODY_WAITED
from tests.chaos.run import Outcome, run
from tests.chaos.subjects import POOLS, STALK, STOCK, Subject
from tests.chaos.testbeds.base import Plan

# Seconds: three renewals in it have time enough on two busy cores, also where Redis answers a second late.
LEASE = 6
# Where no lease has to run out: long enough that none does on a busy machine.
LONG_LEASE = 10
# A load of two seconds with chords, and of as many more as the fault needs; nodes beside other tests on two cores keep
# up with it.
COUNT, RATE = 60, 30.0
# Those of `make test`: each kind of fault, on the pool on which it shows most.
QUICK = {
    "sigkill_node": "threads",
    "sigkill_child": "prefork",
    "freeze_node": "solo",
    "term_node": "threads",
    "poison": "prefork",
    "long_task": "solo",
    "cut_connections": "prefork",
    "drop_claim_reply": "solo",
    "redis_kill": "threads",
    "redis_restart": "solo",
}
# Each of their strikes costs the start of a node or of Redis: once there, and as often as others among the slow ones.
ONCE = {"sigkill_node", "term_node", "redis_kill", "redis_restart"}
SLOW = {fault: POOLS[index % len(POOLS)] for index, fault in enumerate(FAULTS) if fault not in QUICK or fault in ONCE}
TURNS = [
    *((fault, pool, 1 if fault in ONCE else FAULTS[fault].times[0]) for fault, pool in QUICK.items()),
    *(pytest.param(fault, pool, FAULTS[fault].times[0], marks=pytest.mark.slow) for fault, pool in SLOW.items()),
]
# They cut connections or stop Redis, for less than a lease; all others, and the freezes, are about leases.
OUTAGES = {name for name in FAULTS if name.startswith(("cut_", "drop_", "redis_"))} - {"redis_freeze"}
# Faults of Redis's own file, memory and scripts, which differ between its versions.
OF_REDIS = ("redis_kill", "redis_full_at_pop", "script_flush", "torn_append_only_file")


def outcome(fault: str, pool: str, subject: Subject, directory: Path, times: int = 0) -> Outcome:
    """Run a fault so many times, or as often as its short form says."""
    lease, times = LONG_LEASE if fault in OUTAGES else LEASE, times or FAULTS[fault].times[0]
    return run(Plan(fault, pool, subject, lease, times, COUNT, RATE, seed=1), directory)


@pytest.mark.each_redis(*OF_REDIS)
@pytest.mark.parametrize(("fault", "pool", "times"), TURNS)
def test_nothing_is_lost_and_nothing_runs_twice_without_a_cause(
    fault: str, pool: str, times: int, tmp_path: Path
) -> None:
    found = outcome(fault, pool, STALK, tmp_path, times)

    assert not found.breaches, found.describe()
    assert found.executed == found.sent - len(found.never_kept) - len(found.lost) > 0


# The same operations find what kombu's own transport loses and doubles, so they would find it in Stalk.


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "pool"), [("kill_clients_with_publish", "prefork"), ("redis_full_at_pop", "solo")])
def test_stock_loses_what_it_has_popped_when_its_connection_is_cut_or_redis_is_full(
    fault: str, pool: str, tmp_path: Path
) -> None:
    found = outcome(fault, pool, STOCK, tmp_path, times=2)
    # On a busy machine no node may have been waiting for the message: in both strikes, none would have popped it.
    popped = found.times - found.remarks.count(NOBODY_WAITED)
    assert found.sent == 2, found
    assert len(found.lost) == popped > 0, found


@pytest.mark.slow
def test_stock_loses_a_task_whose_way_to_the_worker_is_cut(tmp_path: Path) -> None:
    found = outcome("drop_claim_reply", "threads", STOCK, tmp_path)
    # The body of a chord that has lost a part never comes into being.
    parts = {task.rpartition("-")[0] for task in found.lost if not task.endswith("-body")}
    on_their_way = [task for task in found.lost if not task.endswith("-body") or task.rpartition("-")[0] not in parts]
    assert len(on_their_way) == found.times, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "pool", "times"),
    [
        ("long_task", "prefork", 1),
        # A busy machine may get to tasks that are scheduled so late that they are held for less than the time-out.
        ("long_eta", "prefork", 3),
        ("cut_connections", "threads", 3),
    ],
)
def test_stock_runs_twice_what_takes_longer_than_its_time_out_or_runs_while_its_connection_is_cut(
    fault: str, pool: str, times: int, tmp_path: Path
) -> None:
    found = outcome(fault, pool, STOCK, tmp_path, times)
    assert found.twice.get(NO_CAUSE, 0) >= 1, found


@pytest.mark.slow
def test_stock_runs_twice_what_was_published_without_an_answer(tmp_path: Path) -> None:
    found = outcome("drop_publish_reply", "threads", STOCK, tmp_path)
    assert found.twice.get(NO_CAUSE, 0) == found.times, found


@pytest.mark.slow
def test_stock_never_ends_with_poison(tmp_path: Path) -> None:
    found = outcome("poison", "prefork", STOCK, tmp_path)
    assert found.parked == 0, found
    assert found.poisoned.keys() == POISONS.keys(), found
    # Stalk would have put them aside; this one has gone on with each.
    assert min(found.poisoned.values()) > DELIVERIES, found
