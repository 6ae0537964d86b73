"""Faults of nodes: killed, frozen, stopped, killed by their own tasks, beside stock ones."""

import os
import signal
from contextlib import suppress
from time import monotonic

from tests.chaos.event_log import DIED, Event, Incident, is_of
from tests.chaos.faults.fault import LONGER, fault
from tests.chaos.subjects import CONCURRENCY, SOFT_SHUTDOWN, STALK, STOCK, Subject
from tests.chaos.testbeds.base import GO_ON_SECONDS, NODES, POISON, Workload
from tests.chaos.testbeds.processes import STOCK_SECONDS, NodeUnderTest, ProcessTestbed, state
from tests.support.waiting import GaveUp

# Of the lease: shorter even for a lease that was renewed a third of its length ago.
SHORTER = 0.5
# A task that is still running when its node has noticed TERM and is killed: shorter than the soft shutdown.
SLOW_SECONDS = 4.0
# A node logs this when it has noticed TERM.
SHUTDOWN = "[Ss]hutdown"
# A killed process is gone within milliseconds, on a busy machine later.
GONE_SECONDS = 60
# WORKER_MAX_DELIVERIES, and the signals that the poison tasks send themselves.
DELIVERIES = 5
POISONS = {"poison-kill": signal.SIGKILL, "poison-segv": signal.SIGSEGV}
# Between the last starts of tasks that have died together (services/broker/lua/sweep.lua).
TURN_SECONDS = 10


@fault(3, 100)
def sigkill_node(testbed: ProcessTestbed) -> None:
    """SIGKILL of a node under load."""
    kill_busy_node(testbed)


def kill_busy_node(testbed: ProcessTestbed) -> None:
    testbed.kill(testbed.choose_busy_node())
    testbed.replace()


@fault(3, 20)
def sigkill_child(testbed: ProcessTestbed) -> None:
    """SIGKILL of a pool child; where there are none, of the node."""
    if testbed.plan.pool != "prefork":
        kill_busy_node(testbed)
        return
    child = testbed.choose_child()
    since, snapshot = monotonic(), testbed.take_snapshot()
    os.kill(child, signal.SIGKILL)
    testbed.incidents.append(Incident(DIED, since, monotonic(), pid=child, snapshot=snapshot))
    testbed.wait(lambda: state(child) == "Z", GONE_SECONDS, "the child is gone")


@fault(1, 5)
def freeze_node(testbed: ProcessTestbed) -> None:
    """A node frozen for longer than its lease, then let go on."""
    freeze_for(testbed, testbed.plan.lease * LONGER)


@fault(1, 5)
def freeze_node_briefly(testbed: ProcessTestbed) -> None:
    """A node frozen for half a lease."""
    freeze_for(testbed, testbed.plan.lease * SHORTER)


def freeze_for(testbed: ProcessTestbed, seconds: float) -> None:
    node = testbed.choose_busy_node()
    testbed.freeze(node)
    testbed.let_time_pass(seconds)
    assert state(node.process.pid) == "T", f"{node.name} did not stay frozen"
    testbed.thaw(node)


@fault(2, 10, seconds=0.05)
def term_node(testbed: ProcessTestbed) -> None:
    """TERM of a node under load."""
    stop_node(testbed, testbed.choose_busy_node())
    testbed.replace()


def stop_node(testbed: ProcessTestbed, node: NodeUnderTest) -> None:
    node.leaving = True
    node.process.terminate()
    seconds = STOCK_SECONDS if node.subject == STOCK else SOFT_SHUTDOWN + GO_ON_SECONDS
    try:
        testbed.wait(lambda: not node.alive, seconds, f"{node.name} leaves")
    except GaveUp:
        if node.subject != STOCK:
            raise
        # Celery's prefork pool sometimes waits for ever in its warm shutdown. Docker and Supervisor kill it then.
        testbed.remarks.append(f"{node.name} did not leave")
        testbed.kill(node)
        return
    assert node.process.code == 0, node.process.tail()


@fault(1, 5)
def term_node_then_kill(testbed: ProcessTestbed) -> None:
    """TERM of a node in the middle of a task, and KILL before it has ended."""
    label = testbed.new_label("slow")
    testbed.send(Workload(label, argument=SLOW_SECONDS))
    (node,) = testbed.wait(
        lambda: find_runner(testbed, label), testbed.plan.lease + GO_ON_SECONDS, "the slow task runs"
    )
    if testbed.plan.subject == STALK:
        testbed.wait(
            lambda: any(is_of(task, label) for task in testbed.take_snapshot().started),
            GO_ON_SECONDS,
            "Redis knows that the slow task has started",
        )
    node.leaving = True
    node.process.terminate()
    testbed.wait(lambda: node.process.count(SHUTDOWN), GO_ON_SECONDS, f"{node.name} takes notice of TERM")
    assert node.alive, f"{node.name} has left before it was killed"
    testbed.kill(node)
    testbed.replace()


def find_runner(testbed: ProcessTestbed, label: str) -> list[NodeUnderTest]:
    """The node that runs the task with this label."""
    names = {event.node for event in testbed.events.running() if is_of(event.task, label)}
    return [node for node in testbed.working_nodes() if node.name in names][:1]


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
            testbed.wait(
                lambda: min(count_starts(testbed.events.all()).values()) > DELIVERIES, seconds, "the poison goes on"
            )
    for label, count in count_starts(testbed.events.all()).items():
        assert count, f"{label} has never started"
        testbed.remarks.append(f"{label} started {count} times")


def count_starts(events: list[Event]) -> dict[str, int]:
    """How often each poison has started."""
    found = [event.task for event in events if event.word == "start"]
    return {label: sum(1 for task in found if task.startswith(f"chaos-{label}")) for label in POISONS}


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
