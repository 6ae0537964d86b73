"""A task that ends with an error that is no Exception fails with it, once, in every pool; only deaths count."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.support.checkout import odd_checkout
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, start_workers, wait_acknowledged
from tests.support.world import Stack, World

# How it ends → the class and the message that clients, logs and pages have to show.
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
    start_workers(stack)
    return stack


def wait_failed(stack: Stack, result: Any) -> dict[str, Any]:
    """Wait until a task has failed; return what is stored of it."""
    stack.world.wait_until(lambda: result.state == "FAILURE", TIMEOUT_SECONDS, f"{result.id} fails")
    meta: dict[str, Any] = stack.client.backend._get_task_meta_for(result.id)
    return meta


@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_task_fails_once_with_its_error_and_its_hook_is_called(stack: Stack, pool: str, how: str) -> None:
    label = f"{pool}-{how}"
    name, said = ERRORS[how]

    result = stack.send("odd_tasks.end_hooked", label, how, queue=pool)

    meta = wait_failed(stack, result)
    assert type(meta["result"]).__name__ == name
    assert said in str(meta["result"])
    assert "in end_hooked" in meta["traceback"]
    stack.nodes[POOLS.index(pool)].says(rf"odd_tasks\.end_hooked\[{result.id}\] raised unexpected: {name}\(")
    # What was sent after it runs on the same node: nothing has ended with it.
    assert stack.send("probe.mark", f"{label}-after", queue=pool).get(timeout=TIMEOUT_SECONDS) == f"{label}-after"
    assert (stack.world.started(label), len(stack.world.notes(f"hook-{name}", label))) == (1, 1)
    wait_acknowledged(stack)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_exits_in_a_hook_fails_once(stack: Stack, pool: str) -> None:
    result = stack.send("odd_tasks.end_in_hook", f"{pool}-before", queue=pool)

    meta = wait_failed(stack, result)
    assert (type(meta["result"]).__name__, str(meta["result"])) == ("SystemExit", "before it began")
    stack.send("probe.mark", f"{pool}-before-after", queue=pool).get(timeout=TIMEOUT_SECONDS)
    assert stack.world.started(f"{pool}-before") == 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_is_called_like_a_function_raises_what_it_raises(stack: Stack, pool: str) -> None:
    assert (
        stack.send("odd_tasks.call_inside", f"{pool}-calls", queue=pool).get(timeout=TIMEOUT_SECONDS) == "exit no more"
    )


@pytest.mark.parametrize("how", ["shutdown", "terminate"])
def test_a_task_that_stops_its_node_fails_and_stops_no_other(stack: Stack, how: str) -> None:
    """If it were requeued, it would stop the next node that runs it."""
    wait_acknowledged(stack)
    nodes, sent = [], []
    for pool in POOLS:
        queue = f"{how}-{pool}"
        nodes.append(stack.celery(f"worker -P {pool} -Q {queue} -n {queue}@%h -c 1 -l info"))
        sent.append(stack.send("odd_tasks.end_with", queue, how, queue=queue))
    for node, result in zip(nodes, sent, strict=True):
        assert type(wait_failed(stack, result)["result"]).__name__ == f"Worker{how.capitalize()}"
        node.exits(TIMEOUT_SECONDS)
    assert [stack.world.started(f"{how}-{pool}") for pool in POOLS] == [1, 1, 1]
    assert (stack.unacked(), [stack.waiting(f"{how}-{pool}") for pool in POOLS]) == (0, [0, 0, 0])


def test_a_client_gets_the_error_itself(stack: Stack) -> None:
    result = stack.send("odd_tasks.end_with", "client", "cancelled", queue="threads")

    with pytest.raises(asyncio.CancelledError, match="by a loop"):
        result.get(timeout=TIMEOUT_SECONDS)


def test_a_task_whose_child_process_is_terminated_runs_again(stack: Stack) -> None:
    """The signal raises SystemExit in the task; that is the end of a process, and counts."""
    result = stack.send("probe.hold", "left", queue="prefork")
    stack.world.wait_started("left")
    [(_, child, _)] = stack.world.notes("start", "left")

    os.kill(child, signal.SIGTERM)

    stack.world.wait_until(lambda: stack.world.started("left") == 2, TIMEOUT_SECONDS, "it is started again")
    stack.world.release("left")
    assert result.get(timeout=TIMEOUT_SECONDS) == "left"
