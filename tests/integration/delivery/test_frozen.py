"""A prefork node that stands still for longer than its lease starts nothing of what lay in its children's pipes."""

from __future__ import annotations

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
from tests.support.processes import children
from tests.support.world import Node, Stack, World

PATIENCE = 120
# Nothing else passes time here; a node on a busy machine renews it all the same.
LEASE = 6
CHILDREN = 2
# Longer than any test waits.
ENDLESS = 600
NOT_STARTED = r"WARNING .*probe\.mark\[\S+\] is not started: its lease ran out before a child got to it"


@pytest.fixture
def stack(world: World) -> Stack:
    return world.stack(WORKER_LEASE=str(LEASE))


@pytest.fixture
def node(stack: Stack) -> Node:
    return start(stack, "frozen", "prefork")


def start(stack: Stack, name: str, pool: str) -> Node:
    """A node of its own, with nobody who would replace it."""
    # A frozen node would answer the greeting of one that has gone by then.
    options = f"--pool={pool} --concurrency={CHILDREN} --hostname={name}@%h --loglevel=info --without-mingle"
    return stack.celery(f"worker {options}")


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def piped(pid: int) -> int:
    """How many bytes lie in the pipes that a process has open."""
    pipes = [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.readlink().name.startswith("pipe:")]
    return sum(map(waiting_in, pipes))


def waiting_in(pipe: Path) -> int:
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        [found] = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    finally:
        os.close(descriptor)
    return int(found)


def freeze_children(stack: Stack, node: Node) -> tuple[list[int], Any]:
    """Stop the children of a node and give one of them a task. Returns the children and the result."""
    world = stack.world
    world.wait_until(lambda: node.process.count(r"frozen@\S+ ready\."), PATIENCE * 2, "the node is ready")
    children_are_known(stack)
    found = children(node.process.pid)
    assert len(found) == CHILDREN, world.describe()
    send_signal(found, signal.SIGSTOP)
    before = sum(map(piped, found))
    result = stack.send("probe.mark", "piped")
    world.wait_until(lambda: sum(map(piped, found)) > before, PATIENCE, "a task lies in a child's pipe")
    return found, result


def children_are_known(stack: Stack) -> None:
    """Wait until each child has run something: the parent gives nothing to one that has not told it that it is up."""
    world, labels = stack.world, [f"up-{number}" for number in range(CHILDREN)]
    for label in labels:
        stack.send("probe.hold", label)
    for label in labels:
        world.wait_started(label)
    for label in labels:
        world.release(label)
    world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "they have ended")


def all_children_work(stack: Stack) -> None:
    """Wait until as many tasks run at a time as there are children."""
    labels = [f"beside-{number}" for number in range(CHILDREN)]
    for label in labels:
        stack.send("probe.rest", label, ENDLESS)
    for label in labels:
        stack.world.wait_started(label)
    stack.world.wait_until(lambda: stack.unacked() == CHILDREN, PATIENCE, "only these are held")
    inspect = stack.client.control.inspect([f"frozen@{os.uname().nodename}"], timeout=PATIENCE)
    # It hears of a start a moment after the task has written it down.
    stack.world.wait_until(lambda: not any(inspect.reserved().values()), PATIENCE, "none waits for a child")


def lease_is_over(stack: Stack) -> bool:
    seconds, microseconds = stack.redis.client().time()
    return lease_end(stack) < int(seconds) + int(microseconds) / 1e6


def lease_end(stack: Stack) -> float:
    """When the lease ends of all that is held, by Redis' clock."""
    client: Any = stack.redis.client()
    [(_, end)] = client.zrange(UNACKED_LEASES, 0, -1, withscores=True)
    return float(end)


@pytest.mark.parametrize("first", ["children", "parent"])
def test_a_task_that_another_node_has_run_meanwhile_is_not_started(stack: Stack, node: Node, first: str) -> None:
    world = stack.world
    frozen, result = freeze_children(stack, node)
    node.process.signal(signal.SIGSTOP)
    other = start(stack, "other", "threads")
    world.wait_until(lambda: world.ended("piped"), PATIENCE * 2, "another node runs it when the lease has run out")
    world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "it is acknowledged")
    other.process.end()

    if first == "children":
        send_signal(frozen, signal.SIGCONT)
        node.process.signal(signal.SIGCONT)
    else:
        node.process.signal(signal.SIGCONT)
        node.says("was lost before its task was started", PATIENCE)
        # By now the parent holds something else whose lease is good, and has given it to a child.
        before = sum(map(piped, frozen))
        stack.send("probe.mark", "next")
        world.wait_until(lambda: stack.unacked() == 1, PATIENCE, "it holds the next task")
        world.wait_until(lambda: sum(map(piped, frozen)) > before, PATIENCE, "the next task lies in a child's pipe")
        send_signal(frozen, signal.SIGCONT)
        world.wait_started("next")

    all_children_work(stack)
    assert (world.started("piped"), result.state) == (1, "SUCCESS"), world.describe()
    node.says(NOT_STARTED, PATIENCE)
    assert node.process.count("ERROR|Traceback") == 0, world.describe()


def test_a_task_that_nobody_has_taken_goes_back_and_runs(stack: Stack, node: Node) -> None:
    world = stack.world
    frozen, result = freeze_children(stack, node)
    node.process.signal(signal.SIGSTOP)
    world.wait_until(lambda: lease_is_over(stack), PATIENCE, "its lease runs out and nobody sweeps")

    send_signal(frozen, signal.SIGCONT)
    world.holds_for(lambda: not world.started("piped"), LEASE / 2, "the child does not start it")
    node.process.signal(signal.SIGCONT)

    node.says(NOT_STARTED, PATIENCE)
    world.wait_until(lambda: world.ended("piped"), PATIENCE, "it runs")
    all_children_work(stack)
    assert (world.started("piped"), result.state) == (1, "SUCCESS"), world.describe()
    # It has not been taken for a task that kills its process.
    assert node.process.count("delivery 2") == 0, world.describe()


def test_a_task_in_a_pipe_is_started_later_than_a_lease_when_its_node_has_lived_on(stack: Stack, node: Node) -> None:
    world = stack.world
    frozen, result = freeze_children(stack, node)
    ends = {lease_end(stack)}

    def renewed_often() -> bool:
        ends.add(lease_end(stack))
        return max(ends) - min(ends) > LEASE

    world.wait_until(renewed_often, PATIENCE, "its lease has been renewed for longer than it lasts")
    send_signal(frozen, signal.SIGCONT)

    assert result.get(timeout=PATIENCE) == "piped"
    assert world.started("piped") == 1, world.describe()
    assert node.process.count(r"is not started|lease: \S+ was lost") == 0, world.describe()
