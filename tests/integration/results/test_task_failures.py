"""A task that ends with an error that is no Exception fails with it, once, in every pool; only deaths count."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.support.checkout import odd_checkout
from tests.support.world import Node, Stack, World

PATIENCE = 120
POOLS = ("prefork", "threads", "solo")
# How it ends → the class and the message that clients, logs and pages have to tell.
ERRORS = {
    "exit": ("SystemExit", "no more"),
    "exit-0": ("SystemExit", "0"),
    "interrupt": ("KeyboardInterrupt", "pressed"),
    "cancelled": ("CancelledError", "by a loop"),
    "own": ("OwnError", "something"),
    "spoken": ("SpokenError", "code 7"),
    "generator": ("GeneratorExit", "closed"),
    "memory": ("MemoryError", "too much"),
    "value": ("ValueError", "plain"),
}


@pytest.fixture(scope="module")
def stack(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A worker of each pool, on the queue of its name."""
    shared_world.checkout = odd_checkout(tmp_path_factory.mktemp("ends") / "code")
    stack = shared_world.stack(CELERY_IMPORTS="probe,odd_tasks", CELERY_TASK_TIME_LIMIT="600")
    for pool in POOLS:
        stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool)
    for node in stack.nodes:
        node.ready()
    return stack


def node_of(stack: Stack, pool: str) -> Node:
    return stack.nodes[POOLS.index(pool)]


def failed(stack: Stack, result: Any) -> dict[str, Any]:
    """What is stored of a task that fails."""
    stack.world.wait_until(lambda: result.state == "FAILURE", PATIENCE, f"{result.id} fails; it is {result.state}")
    meta: dict[str, Any] = stack.client.backend._get_task_meta_for(result.id)
    return meta


@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_task_fails_once_with_the_error_that_ended_it(stack: Stack, pool: str, how: str) -> None:
    label = f"{pool}-{how}"
    name, said = ERRORS[how]

    result = stack.send("odd_tasks.end_with", label, how, queue=pool)

    meta = failed(stack, result)
    assert type(meta["result"]).__name__ == name
    assert said in str(meta["result"])
    assert "in end_with" in meta["traceback"]
    node_of(stack, pool).says(rf"odd_tasks\.end_with\[{result.id}\] raised unexpected: {name}\(")
    # What was sent after it runs on the same node: nothing has ended with it.
    assert stack.send("probe.mark", f"{label}-after", queue=pool).get(timeout=PATIENCE) == f"{label}-after"
    assert stack.world.started(label) == 1
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "both are acknowledged")


@pytest.mark.parametrize("pool", POOLS)
def test_the_hook_of_a_task_that_exits_is_called(stack: Stack, pool: str) -> None:
    result = stack.send("odd_tasks.end_hooked", f"{pool}-hooked", "exit", queue=pool)

    failed(stack, result)
    stack.world.wait_until(
        lambda: len(stack.world.notes("hook-SystemExit", f"{pool}-hooked")) == 1, PATIENCE, "its hook is called"
    )


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_exits_in_a_hook_fails_once(stack: Stack, pool: str) -> None:
    result = stack.send("odd_tasks.end_in_hook", f"{pool}-before", queue=pool)

    meta = failed(stack, result)
    assert (type(meta["result"]).__name__, str(meta["result"])) == ("SystemExit", "before it began")
    stack.send("probe.mark", f"{pool}-before-after", queue=pool).get(timeout=PATIENCE)
    assert stack.world.started(f"{pool}-before") == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_is_called_like_a_function_raises_what_it_raises(stack: Stack, pool: str) -> None:
    assert stack.send("odd_tasks.call_inside", f"{pool}-calls", queue=pool).get(timeout=PATIENCE) == "exit no more"


@pytest.mark.parametrize("how", ["shutdown", "terminate"])
def test_a_task_that_stops_its_node_fails_and_stops_no_other(stack: Stack, how: str) -> None:
    """Given back, it would stop whichever node runs it next."""
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "what ran before is acknowledged")
    nodes, sent = [], []
    for pool in POOLS:
        queue = f"{how}-{pool}"
        nodes.append(stack.celery(f"worker -P {pool} -Q {queue} -n {queue}@%h -c 1 -l info"))
        sent.append(stack.send("odd_tasks.end_with", queue, how, queue=queue))
    for node, result in zip(nodes, sent, strict=True):
        assert type(failed(stack, result)["result"]).__name__ == f"Worker{how.capitalize()}"
        node.exits(PATIENCE)
    assert [stack.world.started(f"{how}-{pool}") for pool in POOLS] == [1, 1, 1]
    assert (stack.unacked(), [stack.waiting(f"{how}-{pool}") for pool in POOLS]) == (0, [0, 0, 0])


def test_a_client_gets_the_error_itself(stack: Stack) -> None:
    result = stack.send("odd_tasks.end_with", "client", "cancelled", queue="threads")

    with pytest.raises(asyncio.CancelledError, match="by a loop"):
        result.get(timeout=PATIENCE)


def test_a_child_that_is_told_to_leave_takes_its_task_for_unfinished(stack: Stack) -> None:
    """The signal raises SystemExit in the task; that is the end of a process, and counts."""
    result = stack.send("probe.hold", "left", queue="prefork")
    stack.world.wait_started("left")
    [(_, child, _)] = stack.world.notes("start", "left")

    os.kill(child, signal.SIGTERM)

    stack.world.wait_until(lambda: stack.world.started("left") == 2, PATIENCE, "it is started again")
    stack.world.release("left")
    assert result.get(timeout=PATIENCE) == "left"
