"""Faults about tasks: longer than the lease, scheduled beyond it, chords, and a restart of everything."""

from contextlib import suppress

from tests.chaos.faults.fault import fault
from tests.chaos.faults.nodes import kill_busy_node
from tests.chaos.subjects import CONCURRENCY
from tests.chaos.testbeds.base import Workload
from tests.chaos.testbeds.processes import ProcessTestbed
from tests.support.waiting import GaveUp


@fault()
def long_task(testbed: ProcessTestbed) -> None:
    """Tasks twice as long as the lease."""
    # They take half of the slots, so that the load goes on.
    label, count, seconds = testbed.new_label("long"), CONCURRENCY[testbed.plan.pool], testbed.plan.lease * 2
    testbed.send(Workload(label, argument=seconds, count=count))
    wait_ended(testbed, label, count, seconds * 2)


@fault()
def long_eta(testbed: ProcessTestbed) -> None:
    """Tasks with an ETA two leases ahead."""
    label, count, seconds = testbed.new_label("eta"), 20, testbed.plan.lease * 2
    testbed.send(Workload(label, count=count, countdown=seconds))
    wait_ended(testbed, label, count, seconds)


def wait_ended(testbed: ProcessTestbed, label: str, count: int, seconds: float) -> None:
    """Wait for tasks to end; those that do not will be missed when all are counted."""
    with suppress(GaveUp):
        testbed.wait_for_tasks("end", label, count, seconds + testbed.allowed_seconds)


@fault(2, 20, load="chords")
def chord_under_kills(testbed: ProcessTestbed) -> None:
    """SIGKILL of a node that works on chords."""
    kill_busy_node(testbed)


@fault()
def restart_of_everything(testbed: ProcessTestbed) -> None:
    """Redis and all nodes killed while tasks wait for a far ETA."""
    # Later than the restart of the last node, however busy the machine is.
    count, seconds = 50, max(testbed.plan.lease * 3, 20)
    testbed.send(Workload("far", count=count, countdown=seconds))
    testbed.wait_progress()
    for node in testbed.working_nodes():
        testbed.kill(node)
    testbed.redis.kill()
    testbed.redis.start()
    testbed.replace()
    wait_ended(testbed, "far", count, seconds)
