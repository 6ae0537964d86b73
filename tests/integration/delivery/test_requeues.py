"""Redeliveries are counted by their cause: requeues by the task, time-outs and deaths; others are not counted."""

import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from celery import Signature, chord

from services.broker.keys import RATE_LIMIT, SCHEDULED, UNACKED
from tests.integration.results.test_dead_letters import letter_with
from tests.support.harness import Harness, Node, Stack
from tests.support.processes import command_line
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, start_workers, wait_acknowledged, wait_running

# Where a task kills its node, it has to wait until it may start alone, half a minute in all.
MORTAL = ("prefork", *(pytest.param(pool, marks=pytest.mark.slow) for pool in ("threads", "solo")))
DELIVERIES, REQUEUES = 2, 3
LEASE = 6


@pytest.fixture(scope="module")
def stack(odd_world: Harness) -> Stack:
    """A worker of each pool, on the queue of its name."""
    stack = odd_world.stack(
        CELERY_IMPORTS="probe,odd_tasks",
        WORKER_MAX_DELIVERIES=str(DELIVERIES),
        WORKER_MAX_REQUEUES=str(REQUEUES),
        WORKER_LEASE=str(LEASE),
    )
    start_workers(stack)
    return stack


def wait_parked(stack: Stack, text: str, reason: str, deliveries: int) -> str:
    """Wait for the dead letter whose message has this in it; return its detail."""
    _, letter = letter_with(stack, text.encode())
    assert (letter["reason"], letter["deliveries"]) == (reason.encode(), b"%d" % deliveries)
    return letter["detail"].decode()


def read_delivery(sent: Any) -> tuple[bool, int]:
    """Whether odd_tasks.tell was redelivered, and its delivery_count."""
    found = sent.get(timeout=TIMEOUT_SECONDS)
    return found["redelivered"], found["delivery_count"]


def find_task(stack: Stack, queue: str, task_id: str) -> tuple[bool, int, int]:
    """Whether a task is scheduled, how many messages are unacknowledged, and how many a queue has: at one moment.

    One after the other, all three miss a task that is on its way from one to the next, or back.
    """
    with stack.redis.client().pipeline() as pipe:
        pipe.zscore(SCHEDULED, task_id)
        pipe.hlen(UNACKED)
        pipe.llen(queue)
        due, unacked, waiting = pipe.execute()
    return due is not None, unacked, waiting


def wait_nothing_left(stack: Stack) -> None:
    """Wait until prefork's queue is empty and all is acknowledged."""
    stack.harness.wait_until(
        lambda: stack.waiting("prefork") == stack.unacked() == 0, TIMEOUT_SECONDS, "nothing is left"
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("times", [1, REQUEUES])
def test_a_requeued_task_comes_back_later_and_later_and_knows_how_often(stack: Stack, pool: str, times: int) -> None:
    label = f"asks-{times}-{pool}"

    counts = stack.send("odd_tasks.requeue", label, times, queue=pool).get(timeout=TIMEOUT_SECONDS)

    assert counts == {"delivery_count": times + 1, "requeue_count": times, "redelivered": True}
    starts = [at for _, _, at in stack.harness.notes("start", label)]
    assert len(starts) == times + 1
    for number, (before, after) in enumerate(pairwise(starts)):
        assert after - before >= 0.1 * 2**number


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_is_requeued_too_often_becomes_a_dead_letter(stack: Stack, pool: str) -> None:
    label = f"never-{pool}"

    result = stack.send("odd_tasks.requeue", label, 1000, queue=pool)

    wait_parked(stack, result.id, "requeued", REQUEUES + 1)
    stack.harness.wait_until(lambda: result.state == "FAILURE", TIMEOUT_SECONDS, "it fails")
    assert stack.harness.started(label) == REQUEUES + 1


def test_a_requeued_task_waits_in_redis_and_is_shown_as_redelivered(stack: Stack) -> None:
    """By `inspect scheduled`; no node is busy with it meanwhile."""
    node = stack.worker(WORKER_POOL="threads", WORKER_QUEUES="waits", WORKER_MAX_REQUEUES="100").ready()
    asks = stack.send("odd_tasks.requeue", "waits", 1000, queue="waits")

    def find_shown() -> dict[str, Any] | None:
        answers = stack.client.control.broadcast("scheduled", reply=True, timeout=1)
        found = (one["request"] for answer in answers for scheduled in answer.values() for one in scheduled)
        return next((one for one in found if one["id"] == asks.id), None)

    # Each time it waits for longer.
    one = stack.harness.wait_until(find_shown, TIMEOUT_SECONDS, "a node shows it")
    assert one["delivery_info"]["redelivered"]
    stack.harness.wait_until(
        lambda: find_task(stack, "waits", asks.id) == (True, 0, 0),
        TIMEOUT_SECONDS,
        "it waits in Redis alone",
    )
    stack.client.control.revoke(asks.id)
    node.process.terminate()


def test_a_task_that_is_to_run_again_after_its_time_limit_ends_as_a_dead_letter(stack: Stack) -> None:
    result = stack.send("odd_tasks.timed_out_again", "limit", queue="prefork")

    assert "hard time limit" in wait_parked(stack, result.id, "crashed", DELIVERIES)
    assert stack.harness.started("limit") == DELIVERIES


def test_a_time_out_of_a_task_that_runs_again_fails_neither_it_nor_its_chord(stack: Stack) -> None:
    errback = Signature("probe.mark", ("not-done",), app=stack.client, immutable=True).set(queue="prefork")
    part = Signature("odd_tasks.timed_out_once", ("again",), app=stack.client).set(queue="prefork")
    body = Signature("probe.collect", ("again-body",), app=stack.client).set(queue="prefork")

    assert chord([part.on_error(errback)], app=stack.client)(body).get(timeout=TIMEOUT_SECONDS) == ["again"]
    wait_nothing_left(stack)
    assert [stack.harness.started(label) for label in ("again", "not-done")] == [2, 0]


def test_a_time_out_that_ends_a_task_is_reported_once(stack: Stack) -> None:
    errback = Signature("probe.mark", ("reported",), app=stack.client, immutable=True).set(queue="prefork")

    stack.send("odd_tasks.timed_out_hooked", "ended", queue="prefork", link_error=errback)

    hooked = partial(stack.harness.notes, "hook-TimeLimitExceeded", "ended")
    stack.harness.wait_until(hooked, TIMEOUT_SECONDS, "its hook is called")
    wait_nothing_left(stack)
    assert (len(hooked()), stack.harness.started("reported"), stack.harness.started("ended")) == (1, 1, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_worker_died_before_it_was_started_is_redelivered_and_not_counted(stack: Stack, pool: str) -> None:
    """It lay in a worker behind another task."""
    queue = f"{pool}-dies"
    settings = {"WORKER_POOL": pool, "WORKER_QUEUES": queue, "WORKER_PREFETCH_MULTIPLIER": "2"}
    stack.send("probe.hold", f"before-{pool}", queue=queue)
    behind = stack.send("odd_tasks.tell", f"behind-{pool}", queue=queue)
    worker = stack.worker(**settings)
    stack.harness.wait_started(f"before-{pool}")
    stack.harness.wait_until(lambda: stack.waiting(queue) == 0, TIMEOUT_SECONDS, "the worker has got both")

    worker.process.end()

    stack.worker(**settings)
    stack.harness.release(f"before-{pool}")
    assert read_delivery(behind) == (True, 1)


# What a worker has got when it stops, the first task of which has ended, by the label of what runs then.
BEFORE_STOP: dict[str, list[tuple[str, ...]]] = {
    "runs": [
        ("odd_tasks.seldom", "ended"),
        ("odd_tasks.seldom", "rated"),
        ("probe.hold", "runs"),
        ("odd_tasks.tell", "last"),
    ],
    # Half a batch, and one that runs.
    "0-batch": [
        ("odd_tasks.in_kept_batches", "kept", "ends"),
        ("odd_tasks.in_batches", "0", "hold"),
        ("odd_tasks.in_batches", "1", "hold"),
    ],
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("running", BEFORE_STOP)
def test_what_is_requeued_at_a_stop_is_neither_redelivered_nor_counted(stack: Stack, pool: str, running: str) -> None:
    queue = f"{running}-{pool}"
    # As if no node of this name had run it: nodes of the same name share their rate.
    stack.redis.client().delete(f"{RATE_LIMIT}odd_tasks.seldom")
    sent = {
        label: stack.send(task, f"{queue}-{label}", *more, queue=queue) for task, label, *more in BEFORE_STOP[running]
    }
    settings = {"WORKER_POOL": pool, "WORKER_QUEUES": queue, "WORKER_PREFETCH_MULTIPLIER": "4"}
    worker = stack.worker(WORKER_SOFT_SHUTDOWN="1", **settings)
    stack.harness.wait_started(f"{queue}-{running}")
    stack.harness.wait_until(lambda: stack.waiting(queue) == 0, TIMEOUT_SECONDS, "the worker has got all")

    worker.process.terminate()
    assert worker.exits(TIMEOUT_SECONDS) == 0

    messages = [json.loads(raw) for raw in stack.redis.client().lrange(queue, 0, -1)]
    labels = sorted(message["headers"]["argsrepr"].split("'")[1] for message in messages)
    assert labels == sorted(f"{queue}-{label}" for label in sent if label != "ended")
    assert [message for message in messages if "delivery_count" in message] == []
    # Nobody goes on with it beside its second start.
    [(_, pid, _)] = stack.harness.notes("start", f"{queue}-{running}")
    assert command_line(pid) == ""
    if running == "0-batch":
        assert worker.process.count("2 tasks still ran in batches and go back to their queues") == 1
        return
    stack.harness.release(f"{queue}-runs")
    stack.worker(**settings)
    assert read_delivery(sent["last"]) == (False, 1)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_waits_for_its_time_or_its_rate_is_not_redelivered(stack: Stack, pool: str) -> None:
    late = stack.send("odd_tasks.tell", f"eta-{pool}", queue=pool, countdown=2)
    rated = [stack.send("odd_tasks.each_second", f"rate-{pool}-{number}", queue=pool) for number in range(2)]

    assert [result.get(timeout=TIMEOUT_SECONDS) for result in rated] == [{"redelivered": False, "count": 1}] * 2
    assert read_delivery(late) == (False, 1)


# Batches: each on a node of its own, which one of them kills.


def send_batch(stack: Stack, pool: str, how: str) -> tuple[Node, list[str]]:
    """Start a worker and send it the two messages of a batch; return their labels too."""
    queue = f"batch-{how}-{pool}"
    worker = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, WORKER_PREFETCH_MULTIPLIER="2")
    labels = [f"{queue}-{number}" for number in range(2)]
    for label in labels:
        stack.send("odd_tasks.in_batches", label, how, queue=queue)
    return worker, labels


@pytest.mark.parametrize("pool", POOLS)
def test_a_batch_that_exits_is_acknowledged(stack: Stack, pool: str) -> None:
    worker, labels = send_batch(stack, pool, "exit")

    wait_running(stack, labels)
    wait_acknowledged(stack)
    worker.says("a batch of 2 tasks ended with an error").says("SystemExit: in a batch")
    assert [stack.harness.started(label) for label in labels] == [1, 1]
    assert stack.waiting(f"batch-exit-{pool}") == 0


@pytest.mark.parametrize("pool", MORTAL)
def test_a_batch_that_kills_its_process_ends_as_dead_letters(stack: Stack, pool: str) -> None:
    _, labels = send_batch(stack, pool, "kill")

    for label in labels:
        wait_parked(stack, label, "crashed", DELIVERIES)


@pytest.mark.parametrize("pool", MORTAL)
def test_where_tasks_are_deduplicated_a_chord_is_completed_and_an_old_id_runs_again(stack: Stack, pool: str) -> None:
    """A part that died between its result and its count runs again; a task that only was not acknowledged does not."""
    queue, imports = f"dedupe-{pool}", "probe,odd_tasks,odd_dedupe"
    stack.worker(WORKER_POOL=pool, WORKER_QUEUES=queue, CELERY_IMPORTS=imports)
    part = Signature("probe.fall", (f"{queue}-part",), app=stack.client).set(queue=queue)
    body = Signature("probe.collect", (f"{queue}-body",), app=stack.client).set(queue=queue)

    assert chord([part], app=stack.client)(body).get(timeout=TIMEOUT_SECONDS) == [f"{queue}-part"]
    assert stack.harness.started(f"{queue}-part") == 2

    once = stack.send("odd_tasks.die_when_stored", f"{queue}-once", queue=queue)
    stack.harness.wait_started(f"{queue}-once")
    # Between its two deliveries it may have to wait until it may start alone.
    acknowledged = lambda: find_task(stack, queue, once.id) == (False, 0, 0)  # noqa: E731
    stack.harness.wait_until(acknowledged, TIMEOUT_SECONDS, "it is acknowledged")
    assert (once.state, stack.harness.started(f"{queue}-once")) == ("SUCCESS", 1)

    stack.send("probe.mark", f"{queue}-again", queue=queue, task_id=once.id)
    stack.harness.wait_started(f"{queue}-again")
