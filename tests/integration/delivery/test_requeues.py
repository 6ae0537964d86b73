"""What comes back is counted for what it is: requeues by the task, time-outs and deaths; nothing else is."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from celery import Signature, chord

from services.broker.keys import DEAD_LETTER, DEAD_LETTERS, RATE_LIMIT, SCHEDULED, UNACKED
from tests.support.checkout import odd_checkout
from tests.support.world import Stack, World

PATIENCE = 120
POOLS = ("prefork", "threads", "solo")
# Where a task takes its node along, it waits for its turn, half a minute in all.
MORTAL = ("prefork", *(pytest.param(pool, marks=pytest.mark.slow) for pool in ("threads", "solo")))
DELIVERIES, REQUEUES = 2, 3
LEASE = 6


@pytest.fixture(scope="module")
def stack(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A worker of each pool, on the queue of its name."""
    shared_world.checkout = odd_checkout(tmp_path_factory.mktemp("requeues") / "code")
    stack = shared_world.stack(
        CELERY_IMPORTS="probe,odd_tasks",
        WORKER_MAX_DELIVERIES=str(DELIVERIES),
        WORKER_MAX_REQUEUES=str(REQUEUES),
        WORKER_LEASE=str(LEASE),
    )
    for pool in POOLS:
        stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool)
    for node in stack.nodes:
        node.ready()
    return stack


def letter_of(stack: Stack, text: str) -> dict[str, str]:
    """The dead letter whose message has this in it, once there is one."""

    def found() -> dict[str, str] | None:
        client: Any = stack.redis.client()
        letters = [client.hgetall(f"{DEAD_LETTER}{number}") for number in client.zrange(DEAD_LETTERS, 0, -1)]
        return next((letter for letter in letters if text in letter["message"]), None)

    return stack.world.wait_until(found, PATIENCE, f"a dead letter with {text}")


def places(stack: Stack, queue: str, task_id: str) -> tuple[bool, int, int]:
    """Whether a task waits in Redis, how many messages nodes hold, and how many a queue has: all at one moment.

    One after the other, all three miss a task that is on its way from one to the next, or back.
    """
    with stack.redis.client().pipeline() as pipe:
        pipe.zscore(SCHEDULED, task_id)
        pipe.hlen(UNACKED)
        pipe.llen(queue)
        due, held, waiting = pipe.execute()
    return due is not None, held, waiting


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_is_run_for_the_first_time_is_not_redelivered(stack: Stack, pool: str) -> None:
    told = stack.send("odd_tasks.tell", f"first-{pool}", queue=pool).get(timeout=PATIENCE)

    assert (told["redelivered"], told["delivery_count"]) == (False, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_waits_to_be_redelivered_runs_twice(stack: Stack, pool: str) -> None:
    label = f"until-{pool}"

    assert stack.send("odd_tasks.until_redelivered", label, queue=pool).get(timeout=PATIENCE) == 2
    assert stack.world.started(label) == 2


@pytest.mark.parametrize("pool", POOLS)
def test_a_requeued_task_comes_back_later_and_later_and_knows_how_often(stack: Stack, pool: str) -> None:
    label = f"asks-{pool}"

    seen = stack.send("odd_tasks.requeue", label, REQUEUES, queue=pool).get(timeout=PATIENCE)

    assert seen == {"delivery_count": REQUEUES + 1, "requeue_count": REQUEUES, "redelivered": True}
    starts = [at for _, _, at in stack.world.notes("start", label)]
    for number, (before, after) in enumerate(pairwise(starts)):
        assert after - before >= 0.1 * 2**number


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_is_requeued_too_often_becomes_a_dead_letter(stack: Stack, pool: str) -> None:
    label = f"never-{pool}"

    result = stack.send("odd_tasks.requeue", label, 1000, queue=pool)

    letter = letter_of(stack, result.id)
    assert (letter["reason"], letter["deliveries"]) == ("requeued", str(REQUEUES + 1))
    stack.world.wait_until(lambda: result.state == "FAILURE", PATIENCE, "its caller is told")
    assert stack.world.started(label) == REQUEUES + 1


def test_a_requeued_task_waits_in_redis_and_is_told_of_as_redelivered(stack: Stack) -> None:
    """A node that is asked for what is scheduled says so; no node is busy with it meanwhile."""
    node = stack.worker(WORKER_POOL="threads", WORKER_QUEUES="waits", WORKER_MAX_REQUEUES="100").ready()
    asks = stack.send("odd_tasks.requeue", "waits", 1000, queue="waits")

    def told() -> dict[str, Any] | None:
        answers = stack.client.control.broadcast("scheduled", reply=True, timeout=1)
        found = (one["request"] for answer in answers for scheduled in answer.values() for one in scheduled)
        return next((one for one in found if one["id"] == asks.id), None)

    # Each time it waits for longer.
    one = stack.world.wait_until(told, PATIENCE, "a node tells of it")
    assert one["delivery_info"]["redelivered"]
    stack.world.wait_until(
        lambda: places(stack, "waits", asks.id) == (True, 0, 0), PATIENCE, "it waits in Redis and nowhere else"
    )
    stack.client.control.revoke(asks.id)
    node.process.terminate()


def test_a_task_that_runs_into_its_time_limit_and_is_not_done_by_that_ends_as_a_dead_letter(stack: Stack) -> None:
    result = stack.send("odd_tasks.timed_out_again", "limit", queue="prefork")

    letter = letter_of(stack, result.id)
    assert (letter["reason"], letter["deliveries"]) == ("crashed", str(DELIVERIES))
    assert "hard time limit" in letter["detail"]
    assert stack.world.started("limit") == DELIVERIES


def test_a_time_out_of_a_task_that_runs_again_fails_neither_it_nor_its_chord(stack: Stack) -> None:
    errback = Signature("probe.mark", ("not-done",), app=stack.client, immutable=True).set(queue="prefork")
    part = Signature("odd_tasks.timed_out_once", ("again",), app=stack.client).set(queue="prefork")
    body = Signature("probe.collect", ("again-body",), app=stack.client).set(queue="prefork")

    assert chord([part.on_error(errback)], app=stack.client)(body).get(timeout=PATIENCE) == ["again"]
    stack.world.wait_until(lambda: stack.waiting("prefork") == stack.unacked() == 0, PATIENCE, "nothing is left")
    assert [stack.world.started(label) for label in ("again", "not-done")] == [2, 0]


def test_a_time_out_that_ends_a_task_is_told_once(stack: Stack) -> None:
    errback = Signature("probe.mark", ("told",), app=stack.client, immutable=True).set(queue="prefork")

    stack.send("odd_tasks.timed_out_hooked", "ended", queue="prefork", link_error=errback)

    hooked = partial(stack.world.notes, "hook-TimeLimitExceeded", "ended")
    stack.world.wait_until(hooked, PATIENCE, "its hook is called")
    stack.world.wait_until(lambda: stack.waiting("prefork") == stack.unacked() == 0, PATIENCE, "nothing is left")
    assert (len(hooked()), stack.world.started("told"), stack.world.started("ended")) == (1, 1, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_holder_died_before_it_was_started_is_redelivered_and_not_counted(stack: Stack, pool: str) -> None:
    """It lay in a worker behind another task."""
    queue = f"{pool}-dies"
    stack.send("probe.hold", f"before-{pool}", queue=queue)
    behind = stack.send("odd_tasks.tell", f"behind-{pool}", queue=queue)
    worker = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, WORKER_PREFETCH_MULTIPLIER="2")
    stack.world.wait_started(f"before-{pool}")
    stack.world.wait_until(lambda: stack.waiting(queue) == 0, PATIENCE, "the worker has got both")

    worker.process.end()

    stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, WORKER_PREFETCH_MULTIPLIER="2")
    stack.world.release(f"before-{pool}")
    told = behind.get(timeout=PATIENCE)
    assert (told["redelivered"], told["delivery_count"]) == (True, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_given_back_at_a_stop_counts_as_nothing(stack: Stack, pool: str) -> None:
    """What ran, what waits for its rate, and what lay behind them."""
    queue = f"stops-{pool}"
    # Nodes of the same name have one rate.
    stack.redis.client().delete(f"{RATE_LIMIT}odd_tasks.seldom")
    for task, label in (("odd_tasks.seldom", "ran"), ("odd_tasks.seldom", "rated"), ("probe.hold", "runs")):
        stack.send(task, f"{queue}-{label}", queue=queue)
    behind = stack.send("odd_tasks.tell", f"{queue}-behind", queue=queue)
    settings = {"WORKER_POOL": pool, "WORKER_QUEUES": queue, "WORKER_PREFETCH_MULTIPLIER": "4"}
    worker = stack.worker(WORKER_SOFT_SHUTDOWN="1", **settings)
    stack.world.wait_started(f"{queue}-runs")
    stack.world.wait_until(lambda: stack.waiting(queue) == 0, PATIENCE, "the worker has got all")

    worker.process.terminate()
    assert worker.exits(PATIENCE) == 0

    messages = [json.loads(raw) for raw in stack.redis.client().lrange(queue, 0, -1)]
    labels = sorted(message["headers"]["argsrepr"].split("'")[1] for message in messages)
    assert labels == [f"{queue}-{label}" for label in ("behind", "rated", "runs")]
    assert [message for message in messages if "delivery_count" in message] == []
    stack.world.release(f"{queue}-runs")
    stack.worker(**settings)
    told = behind.get(timeout=PATIENCE)
    assert (told["redelivered"], told["delivery_count"]) == (False, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_waits_for_its_rate_is_not_redelivered(stack: Stack, pool: str) -> None:
    sent = [stack.send("odd_tasks.each_second", f"rate-{pool}-{number}", queue=pool) for number in range(2)]

    told = [result.get(timeout=PATIENCE) for result in sent]

    assert told == [{"redelivered": False, "count": 1}] * 2


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_waits_for_its_time_is_not_redelivered(stack: Stack, pool: str) -> None:
    told: dict[str, Any] = stack.send("odd_tasks.tell", f"eta-{pool}", queue=pool, countdown=2).get(timeout=PATIENCE)

    assert (told["redelivered"], told["delivery_count"]) == (False, 1)


# Batches: a node of its own, because a batch that kills takes it along.


def send_batch(stack: Stack, queue: str, how: str) -> list[str]:
    labels = [f"{queue}-{number}" for number in range(2)]
    for label in labels:
        stack.send("odd_tasks.in_batches", label, how, queue=queue)
    return labels


@pytest.mark.parametrize("how", ["ends", "exit"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_batch_that_ends_is_acknowledged(stack: Stack, pool: str, how: str) -> None:
    queue = f"batch-{how}-{pool}"
    worker = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, WORKER_PREFETCH_MULTIPLIER="2").ready()

    labels = send_batch(stack, queue, how)

    for label in labels:
        stack.world.wait_started(label)
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "the batch is acknowledged")
    if how == "exit":
        worker.says("a batch of 2 tasks ended with an error").says("SystemExit: in a batch")
    assert [stack.world.started(label) for label in labels] == [1, 1]
    assert stack.waiting(queue) == 0


@pytest.mark.parametrize("pool", MORTAL)
def test_a_batch_that_kills_its_process_ends_as_dead_letters(stack: Stack, pool: str) -> None:
    queue = f"batch-kills-{pool}"
    stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, WORKER_PREFETCH_MULTIPLIER="2")

    labels = send_batch(stack, queue, "kill")

    for label in labels:
        assert letter_of(stack, label)["reason"] == "crashed"


@pytest.mark.parametrize("pool", MORTAL)
def test_where_tasks_are_deduplicated_a_chord_is_completed_and_an_old_id_runs_again(stack: Stack, pool: str) -> None:
    """A part that died between its result and its count runs again; what had only not been acknowledged does not."""
    queue, imports = f"dedupe-{pool}", "probe,odd_tasks,odd_dedupe"
    stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, CELERY_IMPORTS=imports)
    part = Signature("probe.fall", (f"{queue}-part",), app=stack.client).set(queue=queue)
    body = Signature("probe.collect", (f"{queue}-body",), app=stack.client).set(queue=queue)

    assert chord([part], app=stack.client)(body).get(timeout=PATIENCE) == [f"{queue}-part"]
    assert stack.world.started(f"{queue}-part") == 2

    once = stack.send("odd_tasks.die_when_stored", f"{queue}-once", queue=queue)
    stack.world.wait_started(f"{queue}-once")
    # Between its two deliveries it may wait for its turn.
    stack.world.wait_until(lambda: places(stack, queue, once.id) == (False, 0, 0), PATIENCE, "it is acknowledged")
    assert (once.state, stack.world.started(f"{queue}-once")) == ("SUCCESS", 1)

    stack.send("probe.mark", f"{queue}-again", queue=queue, task_id=once.id)
    stack.world.wait_started(f"{queue}-again")
