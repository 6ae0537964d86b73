"""Faults of Redis: killed, restarted, frozen, full, its scripts flushed."""

from __future__ import annotations

import signal
from contextlib import suppress
from functools import partial

from redis.exceptions import OutOfMemoryError

from tests.chaos.faults.fault import LONGER, fault
from tests.chaos.faults.packet import publish_with
from tests.chaos.subjects import STALK
from tests.chaos.testbeds.base import GO_ON_SECONDS, Workload
from tests.chaos.testbeds.processes import ProcessTestbed, state

# An outage longer than any client repeats a command for, so that connections fail and come back.
OUTAGE_SECONDS = 1.5
# Redis refuses writes for a while.
FULL_SECONDS = 2.0
# The tasks that fill Redis, a megabyte and a half. They are due when all are there, and most of them have to end before
# Redis uses less than its limit again.
FULL_TASKS, FULL_DUE_SECONDS, FULL_TIMES = 1000, 8.0, 1.06


@fault(2, 10)
def redis_kill(testbed: ProcessTestbed) -> None:
    """Redis killed with -9 and started again on its append-only file."""
    testbed.redis.kill()
    assert testbed.redis.process.code == -signal.SIGKILL
    testbed.let_time_pass(OUTAGE_SECONDS)
    testbed.redis.start()


@fault(2, 10)
def redis_restart(testbed: ProcessTestbed) -> None:
    """Redis restarted in order."""
    testbed.redis.stop()
    assert testbed.redis.process.code == 0
    testbed.let_time_pass(OUTAGE_SECONDS)
    testbed.redis.start()


@fault(1, 3)
def redis_freeze(testbed: ProcessTestbed) -> None:
    """Redis frozen for longer than a lease."""
    testbed.redis.freeze()
    testbed.let_time_pass(testbed.plan.lease * LONGER)
    assert state(testbed.redis.process.pid) == "T"
    testbed.redis.thaw()


@fault(2, 10)
def redis_full(testbed: ProcessTestbed) -> None:
    """Redis full for a while: it refuses every write.

    And then full of tasks, which have to empty it. Stock workers could not.
    """
    testbed.redis.ask("CONFIG", "SET", "maxmemory", "1")
    check_full(testbed)
    testbed.let_time_pass(FULL_SECONDS)
    testbed.redis.make_room()
    if testbed.plan.subject == STALK:
        let_it_empty(testbed)


def check_full(testbed: ProcessTestbed) -> None:
    assert not accepts_writes(testbed), "Redis is not full"


def let_it_empty(testbed: ProcessTestbed) -> None:
    """Fill Redis with tasks that are soon due; only their end makes room."""
    label = testbed.new_label("full")
    testbed.send(Workload(label, count=FULL_TASKS, countdown=FULL_DUE_SECONDS))
    testbed.wait(partial(have_all, testbed, "sent", label), GO_ON_SECONDS, f"{label} is sent")
    testbed.redis.fill(FULL_TIMES)
    check_full(testbed)
    seconds = FULL_DUE_SECONDS + testbed.allowed_seconds
    testbed.wait(partial(have_all, testbed, "end", label), seconds, f"{label} has emptied Redis")
    # Ended tasks are acknowledged a moment later.
    testbed.wait(partial(accepts_writes, testbed), GO_ON_SECONDS, "Redis takes writes again")
    testbed.redis.make_room()


def accepts_writes(testbed: ProcessTestbed) -> bool:
    """Whether Redis uses less than it may."""
    with suppress(OutOfMemoryError):
        return bool(testbed.redis.client().set("chaos-probe", "1"))
    return False


def have_all(testbed: ProcessTestbed, word: str, label: str) -> bool:
    """Whether every task that fills Redis has such an event."""
    return len(testbed.events.tasks_of(word, label)) >= FULL_TASKS


@fault(3, 10, load="")
def redis_full_at_pop(testbed: ProcessTestbed) -> None:
    """Redis full in the same packet as a publish: between a worker's pop and its next write."""
    publish_with(testbed, ["CONFIG", "SET", "maxmemory", "1"])
    testbed.let_time_pass(FULL_SECONDS)
    testbed.redis.make_room()


@fault(10, 100)
def script_flush(testbed: ProcessTestbed) -> None:
    """SCRIPT FLUSH under load."""
    assert testbed.redis.ask("SCRIPT", "FLUSH") == "OK"
