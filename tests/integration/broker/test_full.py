"""A Redis that is full of tasks is emptied by its workers, those included that start while it is full."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord
from kombu.exceptions import OperationalError

from tests.integration.results.outages import OUTAGE_SECONDS, WAITS, sign
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS
from tests.support.world import Node, Stack, World

# Tasks of so many bytes, which are nearly all of what Redis holds then: 16 MB.
PADDED, PADDING = 400, 40_000
# Of maxmemory: workers go on, while a fiftieth of the tasks would have to go before a producer is heard; nobody does.
FULL, USED_UP = 1.06, 1.5
REFUSED = "command not allowed when used memory"
# No transaction: a Redis that is full refuses everything in it.
COUNT = """
local found = redis.call('HLEN', KEYS[1])
for number = 2, #KEYS do
    found = found + redis.call('LLEN', KEYS[number])
end
return found
"""


@pytest.fixture
def stack(world: World) -> Stack:
    return world.stack()


def fill(stack: Stack, queue: str) -> None:
    """Send tasks, until Redis refuses one."""
    sent = 0
    with pytest.raises(OperationalError, match=REFUSED):
        while True:
            # Once: where Redis is full at one try and not at the next, kombu publishes to a channel that it has closed.
            padding = {"padding": "x" * PADDING}
            stack.send("probe.mark", f"{queue}-{sent}", queue=queue, headers=padding, retry=False)
            sent += 1
    assert sent > PADDED / 2


def send_all_kinds(stack: Stack, queue: str) -> dict[str, Any]:
    """Send tasks that send something: retry, callback, next link, chord and other task; what waits for their end."""
    for label in ("retried", "first", "part-0", "part-1", "called", "passing", "chording"):
        stack.world.release(f"{queue}-{label}")
    stack.world.release(f"{queue}-retried-again")
    last = sign(stack, "collect", f"{queue}-last", queue=queue)
    parts = [sign(stack, "end", f"{queue}-part-{number}", "returns", queue=queue) for number in range(2)]
    return {
        "retried": sign(stack, "end", f"{queue}-retried", "retries", queue=queue).apply_async(),
        "last": chain(sign(stack, "end", f"{queue}-first", "returns", queue=queue), last, app=stack.client)(),
        "body": chord(parts, app=stack.client)(sign(stack, "collect", f"{queue}-body", queue=queue)),
        "called": sign(stack, "end", f"{queue}-called", "returns", queue=queue).apply_async(
            link=sign(stack, "collect", f"{queue}-callback", queue=queue)
        ),
        "passing": sign(stack, "pass_on", f"{queue}-passing", queue, queue=queue).apply_async(),
        "chording": sign(stack, "pass_on_chord", f"{queue}-chording", queue, queue=queue).apply_async(),
    }


# How often each label is started: once, and the body of the chord that a task sends is called like that task.
STARTED = dict.fromkeys(
    (
        *("retried", "retried-again", "first", "last", "part-0", "part-1", "body", "called", "callback"),
        *("passing", "passing-passed-on", "chording-0", "chording-1"),
    ),
    1,
) | {"chording": 2}


def is_empty(stack: Stack, *queues: str) -> bool:
    """Whether no task is in its queue or held: looked at in one step, because what is held sends what is queued."""
    return not stack.redis.client().eval(COUNT, len(queues) + 1, "unacked", *queues)


def is_quiet(node: Node) -> bool:
    """Whether it has said nothing loud of memory; a solo node that answers a newcomer too late has another error."""
    return not any(node.process.count(what) for what in ("OutOfMemoryError", "Frequent restarts", " CRITICAL "))


@pytest.mark.each_redis("prefork")
@pytest.mark.parametrize("pool", POOLS)
def test_a_redis_that_is_full_of_tasks_is_emptied_by_its_workers(stack: Stack, pool: str) -> None:
    world = stack.world
    before = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool).ready()
    held = stack.send("probe.hold", "held", queue=pool)
    world.wait_started("held")
    sent = send_all_kinds(stack, pool)
    used = int(stack.redis.client().info("memory")["used_memory"])
    stack.redis.ask("CONFIG", "SET", "maxmemory", str(used + PADDED * PADDING))
    fill(stack, pool)
    stack.redis.fill(FULL)

    # What is first in the queue ends while Redis is full: the filling comes after it.
    late = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool)
    late.ready()
    world.release("held")

    world.wait_until(lambda: is_empty(stack, pool), TIMEOUT_SECONDS, "it is empty")
    assert [one.get(timeout=TIMEOUT_SECONDS) for one in (held, sent["retried"])] == ["held", f"{pool}-retried-again"]
    assert sent["body"].get(timeout=TIMEOUT_SECONDS) == [f"{pool}-part-0", f"{pool}-part-1"]
    assert {label: world.started(f"{pool}-{label}") for label in STARTED} == STARTED
    assert stack.send("probe.mark", "taken", queue=pool).get(timeout=TIMEOUT_SECONDS) == "taken"
    assert is_quiet(before)
    assert is_quiet(late)
    assert [node.process.count(WAITS) for node in (before, late)] == [0, 0]


@pytest.mark.each_redis
def test_a_redis_whose_headroom_is_used_up_makes_workers_wait_until_there_is_room(stack: Stack) -> None:
    world = stack.world
    before = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool).ready() for pool in POOLS}
    held = [stack.send("probe.hold", f"{pool}-held", queue=pool) for pool in POOLS]
    for pool in POOLS:
        world.wait_started(f"{pool}-held")
    padded = [f"{POOLS[number % len(POOLS)]}-{number}" for number in range(PADDED)]
    for label in padded:
        stack.send("probe.mark", label, queue=label.partition("-")[0], headers={"padding": "x" * PADDING})
    stack.redis.fill(USED_UP)

    # In a solo pool what runs is all that a node has hands for.
    late = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool) for pool in POOLS}
    for node in late.values():
        node.says(WAITS)
    for pool, node in before.items():
        world.release(f"{pool}-held")
        node.says(WAITS)
    firsts = padded[: len(POOLS)]
    world.holds_for(lambda: not any(map(world.started, firsts)), OUTAGE_SECONDS, "nothing is claimed")
    stack.redis.fill(FULL)

    for node in late.values():
        node.ready()
    assert [one.get(timeout=TIMEOUT_SECONDS) for one in held] == [f"{pool}-held" for pool in POOLS]
    world.wait_until(lambda: is_empty(stack, *POOLS), TIMEOUT_SECONDS, "it is empty")
    assert [world.started(label) for label in padded] == [1] * PADDED
    for node in (*before.values(), *late.values()):
        assert is_quiet(node)
        # A line when it begins, and one when it is over.
        assert node.process.count(WAITS) == node.process.count("retry: goes on after")
