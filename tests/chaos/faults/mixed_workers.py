"""The fault of mixed workers: stock and Stalk workers on the same queue."""

from __future__ import annotations

from tests.chaos.faults.fault import fault
from tests.chaos.faults.nodes import stop_node
from tests.chaos.subjects import STALK, STOCK, Subject
from tests.chaos.testbeds.processes import NodeUnderTest, ProcessTestbed


@fault(1, 5, stalk_only=True)
def mixed_workers(testbed: ProcessTestbed) -> None:
    """Stock and Stalk workers on the same queue; one of Stalk is killed, a stock one told to go, and one killed."""
    testbed.kill(choose_node_of(testbed, STALK))
    testbed.start_node(STALK).ready()
    stop_node(testbed, choose_node_of(testbed, STOCK))
    testbed.start_node(STOCK).ready()
    testbed.wait_progress()
    testbed.kill(choose_node_of(testbed, STOCK))
    testbed.start_node(STOCK).ready()


def choose_node_of(testbed: ProcessTestbed, subject: Subject) -> NodeUnderTest:
    """A node of this kind."""
    return testbed.random.choice([each for each in testbed.working_nodes() if each.subject == subject])
