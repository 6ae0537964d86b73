"""What runs in a worker container: Supervisor and its nodes, their names and restarts."""

from __future__ import annotations

import os

import pytest

from tests.support.checkout import Checkout
from tests.support.processes import children, command_line
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.world import READY_LINE, Node, Stack, World

NODES = ("node0", "node1")
# It takes so long only when one of them has not heard the question, a moment after it said that it is ready.
ANSWER_SECONDS = 20


@pytest.fixture(scope="module")
def stack(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A worker with two nodes, which count as started after 2 s so that tests need not wait for 10."""
    checkout = Checkout(tmp_path_factory.mktemp("worker") / "code")
    checkout.replace("docker/supervisor/worker.conf", "startsecs=5", "startsecs=2")
    checkout.write("broken.py", 'raise RuntimeError("broken on purpose")\n')
    checkout.write("broken_late.py", "import time\ntime.sleep(3)\nimport broken\n")
    shared_world.checkout = checkout
    stack = shared_world.stack()
    stack.worker(WORKER_PROCESSES="2", WORKER_POOL="solo").says(r"node\d entered RUNNING", times=2)
    stack.nodes[0].ready(2)
    return stack


@pytest.fixture(scope="module", autouse=True)
def broken(stack: Stack) -> dict[str, Node]:
    """Workers whose nodes cannot start. Early, because three tries take a while."""
    return {module: stack.worker(CELERY_IMPORTS=module) for module in ("broken", "broken_late")}


def node_process(worker: Node, name: str) -> int:
    """The process of a node; 0 while it has none."""
    return next((pid for pid in children(worker.process.pid) if f"--hostname={name}@" in command_line(pid)), 0)


def names(stack: Stack) -> list[str]:
    """The nodes that answer."""
    answers = stack.client.control.ping(timeout=ANSWER_SECONDS, limit=len(NODES))
    return sorted(name for answer in answers for name in answer)


def wait_answers(stack: Stack) -> None:
    expected = [f"{node}@{os.uname().nodename}" for node in NODES]
    stack.world.wait_until(lambda: names(stack) == expected, TIMEOUT_SECONDS, "both nodes answer to their names")


def test_each_node_has_a_heartbeat_of_its_own(stack: Stack) -> None:
    stack.world.wait_until(
        lambda: [stack.nodes[0].heartbeat(node).read_text() for node in NODES] == ["ready\n", "ready\n"],
        TIMEOUT_SECONDS,
        "each node's own heartbeat says ready",
    )


def test_a_task_that_is_not_safe_from_the_death_of_its_worker_is_named(stack: Stack) -> None:
    stack.nodes[0].says(r"WARNING .*probe\.hasty has acks_late=False")


def test_a_node_that_exits_with_0_is_started_again(stack: Stack) -> None:
    worker = stack.nodes[0]
    # To a node that does not hear yet, a command is lost.
    wait_answers(stack)
    ended, ready = node_process(worker, "node1"), worker.process.count(READY_LINE)

    stack.client.control.shutdown(destination=[f"node1@{os.uname().nodename}"])

    worker.says(r"exited: node1 \(exit status 0; expected\)")
    replaced = lambda: node_process(worker, "node1") not in (0, ended)  # noqa: E731
    stack.world.wait_until(replaced, TIMEOUT_SECONDS, "it has a new process")
    worker.ready(ready + 1)
    wait_answers(stack)


@pytest.mark.parametrize("module", ["broken", "broken_late"])
def test_a_node_that_cannot_start_ends_the_worker_with_a_code(broken: dict[str, Node], module: str) -> None:
    """At once, or only when it has run for longer than Supervisor waits."""
    worker = broken[module]

    assert worker.exits(TIMEOUT_SECONDS) == 1
    assert worker.process.count("RuntimeError: broken on purpose") >= 3
    assert worker.process.count("node0 could not be started") == 1
