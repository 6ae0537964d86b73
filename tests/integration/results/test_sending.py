"""What a task sends waits for a broker that takes nothing: what follows the task, its retry, any other message.

Results have a Redis of their own here, so that it can be seen that no task fails meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from celery import chain, chord

from tests.integration.results.test_results import (
    OUTAGE_SECONDS,
    PATIENCE,
    POOLS,
    WAITS,
    Results,
    release,
    running,
    signature,
)
from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.world import Node, Stack, World

LEASE = 6
# What a task sends → how many messages that is.
KINDS = {"link": 1, "callback": 1, "callbacks": 2, "body": 1, "other": 1, "retry": 0}


def send(stack: Stack, kind: str, label: str, pool: str) -> None:
    """Send a task to a pool that sends something, to the queue of its label, when it is released."""
    task = signature(stack, "end", label, "returns", queue=pool)
    late = signature(stack, "collect", f"{label}-late", queue=label)
    if kind == "link":
        chain(task, late, app=stack.client).apply_async()
    elif kind == "callback":
        task.apply_async(link=late)
    elif kind == "callbacks":
        task.apply_async(link=[late, late.clone()])
    elif kind == "body":
        chord([task], app=stack.client)(late)
    else:
        how = {"retry": ("end", label, "retries"), "other": ("pass_on", label, label)}[kind]
        signature(stack, *how, queue=pool).apply_async()


@pytest.fixture(scope="module")
def bench(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Results, Results]:
    """A stack, the Redis that carries its tasks, and the one that keeps results; code that soon gives up a socket."""
    checkout = Checkout(tmp_path_factory.mktemp("sending") / "code")
    checkout.fork_server = LIBRARIES_ONLY
    checkout.replace("config/celery.py", "\nSOCKET_TIMEOUT_SECONDS = 10", "\nSOCKET_TIMEOUT_SECONDS = 2")
    checkout.replace("services/broker/retry.py", "LONGEST_PAUSE_SECONDS = 5.0", "LONGEST_PAUSE_SECONDS = 1.0")
    shared_world.checkout = checkout
    broker, kept = shared_world.redis(), shared_world.redis()
    stack = shared_world.stack(broker, CELERY_RESULT_BACKEND=kept.url(1, password=""))
    return stack, Results(broker), Results(kept)


@pytest.fixture(scope="module")
def nodes(bench: tuple[Stack, Results, Results]) -> dict[str, Node]:
    """A worker of each pool, with room for a task of each kind, on the queue of its pool's name."""
    stack, _, _ = bench
    room = {pool: {"WORKER_CONCURRENCY": str(len(KINDS))} for pool in POOLS} | {
        "solo": {"WORKER_PROCESSES": str(len(KINDS))}
    }
    found = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool, **room[pool]) for pool in POOLS}
    for pool, node in found.items():
        node.ready(len(KINDS) if pool == "solo" else 1)
    return found


@pytest.mark.parametrize("fault", ["killed", "frozen", "full"])
def test_what_a_task_sends_while_the_broker_takes_nothing_is_sent_later_and_once(
    bench: tuple[Stack, Results, Results], nodes: dict[str, Node], fault: str
) -> None:
    stack, broker, kept = bench
    labels = {f"{fault}-{pool}-{kind}": (pool, kind) for pool in POOLS for kind in KINDS}
    for label, (pool, kind) in labels.items():
        send(stack, kind, label, pool)
    running(stack, labels)

    broker.fail(fault)
    release(stack, labels)
    stack.world.holds_for(lambda: failed(kept) == [], OUTAGE_SECONDS, "no task has failed")
    broker.recover(fault)

    again = [f"{label}-again" for label, (_, kind) in labels.items() if kind == "retry"]
    running(stack, again)
    release(stack, again)
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    wanted = {label: KINDS[kind] for label, (_, kind) in labels.items()}
    assert {label: stack.waiting(label) for label in labels} == wanted
    assert [stack.world.started(label) for label in (*labels, *again)] == [1] * len((*labels, *again))
    assert failed(kept) == []


@pytest.mark.parametrize("fault", ["killed", "frozen", "full"])
def test_a_chord_that_a_task_sends_waits_for_the_results_too(
    bench: tuple[Stack, Results, Results], nodes: dict[str, Node], fault: str
) -> None:
    stack, _, kept = bench
    labels = {f"results-{fault}-{pool}-{kind}": (pool, kind) for pool in POOLS for kind in ("after", "own")}
    for label, (pool, kind) in labels.items():
        if kind == "own":
            signature(stack, "pass_on_chord", label, label, queue=pool).apply_async()
            continue
        parts = [signature(stack, "collect", f"{label}-{number}", queue=label) for number in range(2)]
        late = chord(parts, signature(stack, "collect", label, queue=label))
        chain(signature(stack, "end", label, "returns", queue=pool), late, app=stack.client).apply_async()
    running(stack, labels)
    before = sizes(kept).count("2")

    kept.fail(fault)
    release(stack, labels)
    stack.world.holds_for(lambda: stack.unacked() == len(labels), OUTAGE_SECONDS, "all tasks wait")
    kept.recover(fault)

    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert {label: stack.waiting(label) for label in labels} == dict.fromkeys(labels, 2)
    assert sizes(kept).count("2") - before == len(labels)
    assert failed(kept) == []


def test_a_soft_time_limit_does_not_come_to_a_task_that_has_ended(bench: tuple[Stack, Results, Results]) -> None:
    """What follows it waits for the broker, and neither task nor chord fails."""
    stack, broker, kept = bench
    labels = {f"limit-{kind}": kind for kind in ("body", "callback", "link")}
    for label, kind in labels.items():
        send(stack, kind, label, "limited")
    # Of its own: who has just waited says so again a minute later.
    worker = stack.worker(WORKER_QUEUES="limited", WORKER_CONCURRENCY=str(len(labels)))
    running(stack, labels)

    broker.fail("killed")
    release(stack, labels)
    worker.says(WAITS, times=len(labels))
    for label in labels:
        ((_, child, _),) = stack.world.notes("start", label)
        os.kill(child, signal.SIGUSR1)
    stack.world.holds_for(lambda: failed(kept) == [], OUTAGE_SECONDS, "nothing has failed")
    broker.recover("killed")

    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert [stack.waiting(label) for label in labels] == [stack.world.started(label) for label in labels] == [1, 1, 1]
    assert failed(kept) == []


@pytest.mark.slow
def test_a_cold_stop_while_the_body_of_a_chord_waits_fails_no_chord(bench: tuple[Stack, Results, Results]) -> None:
    """The task goes back, and whoever runs it again sends the body."""
    stack, broker, kept = bench
    labels = {f"cold-{pool}-late": pool for pool in POOLS}
    workers = {}
    # The broker is away when they stop, so that only the end of their leases brings the tasks back.
    for label, pool in labels.items():
        command = f"worker -P {pool} -Q cold-{pool} -n cold-{pool}@%h -c 1 -l info"
        workers[label] = stack.celery(command, WORKER_LEASE=str(LEASE)).says(rf"cold-{pool}@\S+ ready\.")
        send(stack, "body", label, f"cold-{pool}")
    running(stack, labels)

    broker.fail("killed")
    release(stack, labels)
    for worker in workers.values():
        worker.says(WAITS)
        worker.process.signal(signal.SIGQUIT)
    for worker in workers.values():
        worker.exits(PATIENCE)
    assert failed(kept) == []
    broker.recover("killed")

    stack.worker(WORKER_QUEUES=",".join(f"cold-{pool}" for pool in POOLS), WORKER_LEASE=str(LEASE))
    for label in labels:
        stack.world.wait_until(lambda label=label: stack.waiting(label) == 1, PATIENCE, f"the body of {label} is sent")  # type: ignore[misc]
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert {label: stack.waiting(label) for label in labels} == dict.fromkeys(labels, 1)
    assert failed(kept) == []


def sizes(kept: Results) -> list[str]:
    """How many parts the chords have that are not complete."""
    client = kept.redis.client(1)
    return [str(client.get(key)) for key in client.scan_iter(match="celery-taskset-meta-*.s", count=1000)]


def failed(kept: Results) -> list[dict[str, Any]]:
    """The results that say of a task that it has failed."""
    client = kept.redis.client(1)
    found = [json.loads(str(client.get(key))) for key in client.scan_iter(match="celery-task-meta-*", count=1000)]
    return [one for one in found if one["status"] == "FAILURE"]
