"""What a task sends waits for a broker that takes nothing: what follows the task, its retry, any other message.

Results have a Redis of their own here, so that it can be seen that no task fails meanwhile.
"""

import json
import os
import signal

import pytest
from celery import chain, chord

from tests.integration.results.outages import FAULTS, OUTAGE_SECONDS, WAITS, break_redis, repair_redis, sign
from tests.support.harness import Node, Stack
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, release, start_workers, wait_acknowledged, wait_running

LEASE = 6
# What a task sends → how many messages that is.
KINDS = {"link": 1, "callback": 1, "callbacks": 2, "body": 1, "other": 1, "retry": 0}


def send(stack: Stack, kind: str, label: str, pool: str) -> None:
    """Send a task to a pool that sends something, to the queue of its label, when it is released."""
    task = sign(stack, "end", label, "retries" if kind == "retry" else "returns", queue=pool)
    late = sign(stack, "collect", f"{label}-late", queue=label)
    if kind == "link":
        chain(task, late, app=stack.client).apply_async()
    elif kind == "body":
        chord([task], app=stack.client)(late)
    elif kind == "other":
        sign(stack, "pass_on", label, label, queue=pool).apply_async()
    else:
        task.apply_async(link={"retry": [], "callback": late, "callbacks": [late, late.clone()]}[kind])


@pytest.fixture(scope="module")
def workers(stack: Stack) -> dict[str, Node]:
    """A worker of each pool, with room for a task of each kind."""
    return start_workers(stack, len(KINDS))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_task_sends_while_the_broker_takes_nothing_is_sent_later_and_once(
    stack: Stack, results: RedisServer, workers: dict[str, Node], fault: str
) -> None:
    labels = {f"{fault}-{pool}-{kind}": (pool, kind) for pool in POOLS for kind in KINDS}
    for label, (pool, kind) in labels.items():
        send(stack, kind, label, pool)
    wait_running(stack, labels)

    break_redis(stack.redis, fault)
    release(stack, labels)
    stack.harness.holds_for(lambda: list_failures(results) == [], OUTAGE_SECONDS, "no task has failed")
    repair_redis(stack.redis, fault)

    again = [f"{label}-again" for label, (_, kind) in labels.items() if kind == "retry"]
    wait_running(stack, again)
    release(stack, again)
    wait_acknowledged(stack)
    wanted = {label: KINDS[kind] for label, (_, kind) in labels.items()}
    assert {label: stack.waiting(label) for label in labels} == wanted
    assert [stack.harness.started(label) for label in (*labels, *again)] == [1] * len((*labels, *again))
    assert list_failures(results) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_chord_that_a_task_sends_waits_for_the_results_too(
    stack: Stack, results: RedisServer, workers: dict[str, Node], fault: str
) -> None:
    labels = {f"results-{fault}-{pool}-{kind}": (pool, kind) for pool in POOLS for kind in ("after", "own")}
    for label, (pool, kind) in labels.items():
        if kind == "own":
            sign(stack, "pass_on_chord", label, label, queue=pool).apply_async()
            continue
        parts = [sign(stack, "collect", f"{label}-{number}", queue=label) for number in range(2)]
        late = chord(parts, sign(stack, "collect", label, queue=label))
        chain(sign(stack, "end", label, "returns", queue=pool), late, app=stack.client).apply_async()
    wait_running(stack, labels)
    before = count_open_chords(results)

    break_redis(results, fault)
    release(stack, labels)
    stack.harness.holds_for(lambda: stack.unacked() == len(labels), OUTAGE_SECONDS, "all tasks wait")
    repair_redis(results, fault)

    wait_acknowledged(stack)
    assert {label: stack.waiting(label) for label in labels} == dict.fromkeys(labels, 2)
    assert count_open_chords(results) - before == len(labels)
    assert list_failures(results) == []


def test_a_soft_time_limit_does_not_come_to_a_task_that_has_ended(stack: Stack, results: RedisServer) -> None:
    """What follows it waits for the broker, and neither task nor chord fails."""
    labels = {f"limit-{kind}": kind for kind in ("body", "callback", "link")}
    for label, kind in labels.items():
        send(stack, kind, label, "limited")
    # One that has just waited would log the next wait a minute later.
    worker = stack.worker(WORKER_QUEUES="limited", WORKER_CONCURRENCY=str(len(labels)))
    wait_running(stack, labels)

    break_redis(stack.redis, "killed")
    release(stack, labels)
    worker.says(WAITS, times=len(labels))
    for label in labels:
        ((_, child, _),) = stack.harness.notes("start", label)
        os.kill(child, signal.SIGUSR1)
    stack.harness.holds_for(lambda: list_failures(results) == [], OUTAGE_SECONDS, "nothing has failed")
    repair_redis(stack.redis, "killed")

    wait_acknowledged(stack)
    assert [stack.waiting(label) for label in labels] == [stack.harness.started(label) for label in labels] == [1, 1, 1]
    assert list_failures(results) == []


@pytest.mark.slow
def test_a_cold_stop_while_the_body_of_a_chord_waits_fails_no_chord(stack: Stack, results: RedisServer) -> None:
    """The task is requeued, and the worker that runs it again sends the body."""
    labels = {f"cold-{pool}-late": pool for pool in POOLS}
    workers = {}
    # The broker is away when they stop, so that only the end of their leases brings the tasks back.
    for label, pool in labels.items():
        command = f"worker -P {pool} -Q cold-{pool} -n cold-{pool}@%h -c 1 -l info"
        workers[label] = stack.celery(command, WORKER_LEASE=str(LEASE)).says(rf"cold-{pool}@\S+ ready\.")
        send(stack, "body", label, f"cold-{pool}")
    wait_running(stack, labels)

    break_redis(stack.redis, "killed")
    release(stack, labels)
    for worker in workers.values():
        worker.says(WAITS)
        worker.process.signal(signal.SIGQUIT)
    for worker in workers.values():
        worker.exits(TIMEOUT_SECONDS)
    assert list_failures(results) == []
    repair_redis(stack.redis, "killed")

    stack.worker(WORKER_QUEUES=",".join(f"cold-{pool}" for pool in POOLS), WORKER_LEASE=str(LEASE))
    stack.harness.wait_until(lambda: all(map(stack.waiting, labels)), TIMEOUT_SECONDS, "their bodies are sent")
    wait_acknowledged(stack)
    assert {label: stack.waiting(label) for label in labels} == dict.fromkeys(labels, 1)
    assert list_failures(results) == []


def count_open_chords(results: RedisServer) -> int:
    """How many chords of two parts are not complete."""
    client = results.client(1)
    return [client.get(key) for key in client.scan_iter("celery-taskset-meta-*.s", count=1000)].count("2")


def list_failures(results: RedisServer) -> list[str]:
    """The results that say of a task that it has failed."""
    client = results.client(1)
    found = (str(client.get(key)) for key in client.scan_iter("celery-task-meta-*", count=1000))
    return [one for one in found if json.loads(one)["status"] == "FAILURE"]
