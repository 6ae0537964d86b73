"""The fault of poison: tasks that kill the process which runs them."""

from __future__ import annotations

import signal
from contextlib import suppress

from tests.chaos.event_log import Event
from tests.chaos.faults.fault import fault
from tests.chaos.subjects import CONCURRENCY, STALK
from tests.chaos.testbeds.base import NODES, POISON, Workload
from tests.chaos.testbeds.processes import ProcessTestbed
from tests.support.waiting import GaveUp

# WORKER_MAX_DELIVERIES, and the signals that the poison tasks send themselves.
DELIVERIES = 5
POISONS = {"poison-kill": signal.SIGKILL, "poison-segv": signal.SIGSEGV}
# Between the last starts of tasks that have died together (services/broker/lua/sweep.lua).
TURN_SECONDS = 10


@fault()
def poison(testbed: ProcessTestbed) -> None:
    """Tasks that kill the process which runs them, by SIGKILL and by SIGSEGV."""
    for label, number in POISONS.items():
        testbed.send(Workload(label, task=POISON, argument=number))
    # Each delivery needs a lease to run out, a sweep after a lease of rest, and a node that starts; for the last two,
    # what both nodes have run takes turns.
    turns = 2 * NODES * CONCURRENCY[testbed.plan.pool] * TURN_SECONDS
    seconds = DELIVERIES * (testbed.plan.lease * 2 + testbed.allowed_seconds) + turns
    if testbed.plan.subject == STALK:
        testbed.wait(lambda: testbed.count_parked() >= len(POISONS), seconds, "the poison is parked")
    else:
        with suppress(GaveUp):
            testbed.wait(lambda: fewest_starts(testbed) > DELIVERIES, seconds, "the poison goes on")
    for label, count in count_starts(testbed.events.all()).items():
        assert count, f"{label} has never started"
        testbed.remarks.append(f"{label} started {count} times")


def fewest_starts(testbed: ProcessTestbed) -> int:
    return min(count_starts(testbed.events.all()).values())


def count_starts(events: list[Event]) -> dict[str, int]:
    """How often each poison has started."""
    found = [event.task for event in events if event.word == "start"]
    return {label: sum(1 for task in found if task.startswith(f"chaos-{label}")) for label in POISONS}
