"""A prefork node that stands still for longer than its lease starts nothing of what lay in its children's pipes."""

import fcntl
import os
import signal
import struct
import termios
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from services.broker.keys import UNACKED_LEASES
from tests.support.harness import Harness, Node, Stack
from tests.support.processes import children
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import wait_acknowledged, wait_running

# A node on a busy machine renews it all the same.
LEASE = 6
CHILDREN = 2
NOT_STARTED = r"WARNING .*probe\.mark\[\S+\] is not started: its lease ran out before a child got to it"


@pytest.fixture
def stack(harness: Harness) -> Stack:
    return harness.stack(WORKER_LEASE=str(LEASE))


@pytest.fixture
def node(stack: Stack) -> Node:
    return start(stack, "frozen", "prefork")


def start(stack: Stack, name: str, pool: str) -> Node:
    """A node that nothing replaces when it is gone."""
    # A frozen node would reply later to the greeting of a node that is gone by then.
    options = f"--pool={pool} --concurrency={CHILDREN} --hostname={name}@%h --loglevel=info --without-mingle"
    return stack.celery(f"worker {options}")


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def piped(pids: Iterable[int]) -> int:
    """How many bytes lie in the pipes that these processes have open."""
    pipes = [path for pid in pids for path in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(map(waiting_in, (path for path in pipes if path.readlink().name.startswith("pipe:"))))


def waiting_in(pipe: Path) -> int:
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        [found] = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    finally:
        os.close(descriptor)
    return int(found)


def freeze_children(stack: Stack, node: Node) -> tuple[list[int], Any]:
    """Stop the children of a node and give one of them a task. Returns the children and the result."""
    harness = stack.harness
    node.says(r"frozen@\S+ ready\.", TIMEOUT_SECONDS * 2)
    # The parent gives nothing to a child that has not reported that it is up.
    harness.release(*fill_children(stack, "up"))
    wait_acknowledged(stack)
    found = children(node.process.pid)
    assert len(found) == CHILDREN, harness.describe()
    send_signal(found, signal.SIGSTOP)
    before = piped(found)
    result = stack.send("probe.mark", "piped")
    harness.wait_until(lambda: piped(found) > before, TIMEOUT_SECONDS, "a task lies in a child's pipe")
    return found, result


def fill_children(stack: Stack, name: str) -> list[str]:
    """Wait until as many tasks run at a time as there are children; return their labels."""
    labels = [f"{name}-{number}" for number in range(CHILDREN)]
    for label in labels:
        stack.send("probe.hold", label)
    wait_running(stack, labels)
    return labels


def check_all_children_work(stack: Stack) -> None:
    fill_children(stack, "beside")
    stack.harness.wait_until(lambda: stack.unacked() == CHILDREN, TIMEOUT_SECONDS, "only these are unacknowledged")
    inspect = stack.client.control.inspect([f"frozen@{os.uname().nodename}"], timeout=TIMEOUT_SECONDS)
    # The node hears of a start a moment after the task has written it down.
    stack.harness.wait_until(lambda: not any(inspect.reserved().values()), TIMEOUT_SECONDS, "none waits for a child")


def lease_end(stack: Stack) -> float:
    """When the only lease ends, by Redis' clock."""
    client: Any = stack.redis.client()
    [(_, end)] = client.zrange(UNACKED_LEASES, 0, -1, withscores=True)
    return float(end)


@pytest.mark.parametrize("first", ["children", "parent"])
def test_a_task_that_another_node_has_run_meanwhile_is_not_started(stack: Stack, node: Node, first: str) -> None:
    harness = stack.harness
    frozen, result = freeze_children(stack, node)
    node.process.signal(signal.SIGSTOP)
    other = start(stack, "other", "threads")
    harness.wait_until(lambda: harness.ended("piped"), TIMEOUT_SECONDS * 2, "another node runs it after its lease")
    wait_acknowledged(stack)
    other.process.end()

    if first == "children":
        send_signal(frozen, signal.SIGCONT)
        node.process.signal(signal.SIGCONT)
    else:
        node.process.signal(signal.SIGCONT)
        node.says("was lost before its task was started", TIMEOUT_SECONDS)
        # The parent claims another task, whose lease is good, and gives it to a child.
        before = piped(frozen)
        stack.send("probe.mark", "next")
        harness.wait_until(lambda: stack.unacked() == 1, TIMEOUT_SECONDS, "it claims the next task")
        harness.wait_until(lambda: piped(frozen) > before, TIMEOUT_SECONDS, "the next task lies in a child's pipe")
        send_signal(frozen, signal.SIGCONT)
        harness.wait_started("next")

    check_all_children_work(stack)
    assert (harness.started("piped"), result.state) == (1, "SUCCESS"), harness.describe()
    node.says(NOT_STARTED, TIMEOUT_SECONDS)
    assert node.process.count("ERROR|Traceback") == 0, harness.describe()


def test_a_task_that_no_other_node_has_taken_is_requeued_and_runs(stack: Stack, node: Node) -> None:
    harness = stack.harness
    frozen, result = freeze_children(stack, node)
    node.process.signal(signal.SIGSTOP)
    ended: Any = lambda: lease_end(stack) < stack.redis.client().time()[0]  # noqa: E731
    harness.wait_until(ended, TIMEOUT_SECONDS, "its lease runs out, with no other node to sweep")

    send_signal(frozen, signal.SIGCONT)
    harness.holds_for(lambda: not harness.started("piped"), LEASE / 2, "the child does not start it")
    node.process.signal(signal.SIGCONT)

    node.says(NOT_STARTED, TIMEOUT_SECONDS)
    harness.wait_until(lambda: harness.ended("piped"), TIMEOUT_SECONDS, "it runs")
    check_all_children_work(stack)
    assert (harness.started("piped"), result.state) == (1, "SUCCESS"), harness.describe()
    # It has not been counted as one that kills its process.
    assert node.process.count("delivery 2") == 0, harness.describe()


def test_a_task_in_a_pipe_is_started_later_than_a_lease_when_its_node_has_lived_on(stack: Stack, node: Node) -> None:
    harness = stack.harness
    frozen, result = freeze_children(stack, node)
    ends = {lease_end(stack)}

    def renewed_often() -> bool:
        ends.add(lease_end(stack))
        return max(ends) - min(ends) > LEASE

    harness.wait_until(renewed_often, TIMEOUT_SECONDS, "its lease has been renewed for longer than it lasts")
    send_signal(frozen, signal.SIGCONT)

    assert result.get(timeout=TIMEOUT_SECONDS) == "piped"
    assert harness.started("piped") == 1, harness.describe()
    assert node.process.count(r"is not started|lease: \S+ was lost") == 0, harness.describe()
