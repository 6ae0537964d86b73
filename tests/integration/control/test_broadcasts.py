"""A broadcast is run by every node that listens, of its own stack; what is under no lease is asked for none."""

import os
import subprocess
from typing import Any

import pytest

from services.supervisor.proc_stat import read_stat
from tests.support.checkout import odd_checkout
from tests.support.harness import Harness, Node, Stack
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, stop

READY = r"\S+@\S+ ready\."


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A node of each pool that hears broadcasts, with the name of its pool."""
    stack = stack_in(shared_harness)
    for pool in POOLS:
        start(stack, pool)
    for node in stack.nodes:
        node.says(READY)
    listens(stack, *POOLS)
    return stack


def stack_in(harness: Harness, *redis: RedisServer, **settings: str) -> Stack:
    harness.checkout = odd_checkout(harness.path("code"))
    return harness.stack(*redis, CELERY_IMPORTS="probe,odd_tasks,odd_broadcast", WORKER_LEASE="6", **settings)


def start(stack: Stack, pool: str, name: str = "", queues: str = "", options: str = "-c 2") -> Node:
    name = name or pool
    return stack.celery(
        f"worker -P {pool} -Q {queues or f'{name},everybody'} -n {name}@%h -l info -f /dev/stderr {options}"
    )


def listens(stack: Stack, *queues: str) -> None:
    """Wait until the nodes of these queues hear broadcasts: each subscribes after its line, before its first task."""
    harness = stack.harness
    for queue in queues:
        label = harness.path(f"listens-{queue}").name
        stack.send("probe.mark", label, queue=queue)
        harness.wait_until(lambda: harness.ended(label), TIMEOUT_SECONDS, f"{queue} listens")  # noqa: B023
    harness.wait_until(lambda: stack.unacked() == 0, TIMEOUT_SECONDS, "that is acknowledged")


def publish(
    stack: Stack, *arguments: str, task: str = "odd_tasks.tell", queue: str | None = "everybody", **options: object
) -> subprocess.CompletedProcess[str]:
    """Send a task from a process of the application, as a web server does; it says the task's id."""
    sent = f"{task!r}, {arguments!r}, queue={queue!r}, **{options!r}"
    code = (
        "import logging; logging.basicConfig(); from services.app import app; app.loader.import_default_modules(); "
        f"print('sent', app.send_task({sent}).id)"
    )
    answer = stack.harness.answer(["-c", code], stack.environment(), TIMEOUT_SECONDS)
    assert answer.stdout.startswith("sent "), answer.stderr
    return answer


def cpu_seconds(node: Node) -> float:
    """What its process has used, without the children of its pool."""
    stat = read_stat(node.process.pid)
    assert stat
    return stat.cpu / os.sysconf("SC_CLK_TCK")


def wait_for_all(stack: Stack, label: str, times: int = len(POOLS)) -> None:
    stack.harness.wait_until(
        lambda: stack.harness.started(label) == times, TIMEOUT_SECONDS, f"{times} nodes have run {label}"
    )


def nothing_more_runs(stack: Stack, label: str, times: int = len(POOLS)) -> None:
    """So many nodes have run it, also when they have run what was broadcast after it."""
    publish(stack, f"after-{label}")
    wait_for_all(stack, f"after-{label}")
    assert stack.harness.started(label) == times


@pytest.mark.parametrize(
    "options",
    [{}, {"countdown": 3}, {"exchange": "everybody"}, {"queue": None, "exchange": "everybody"}],
    ids=["queue", "countdown", "queue-and-exchange", "exchange"],
)
def test_every_node_runs_a_broadcast_under_no_lease(
    stack: Stack, request: pytest.FixtureRequest, options: dict[str, Any]
) -> None:
    label = f"told-{request.node.callspec.id}"
    publish(stack, label, **options)

    wait_for_all(stack, label)
    for node in stack.nodes:
        node.says(r"Task odd_tasks\.tell\[\S+\] succeeded")
        assert "its lease was lost" not in node.process.log()
        assert "Traceback" not in node.process.log()
    assert stack.unacked() == 0


# Task, arguments, how often each node runs it, and what it logs.
ENDS = {
    "exits": ("odd_tasks.end_with", ["exit"], 1, ""),
    "fails": ("odd_tasks.end_with", ["value"], 1, ""),
    "asks": (
        "odd_tasks.until_redelivered",
        [],
        1,
        "is not run again, although its task asks for it: it was a broadcast",
    ),
    "retries": ("probe.fail", [], 2, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_node_runs_a_broadcast_once_and_again_only_for_a_retry(stack: Stack, end: str) -> None:
    task, arguments, times, line = ENDS[end]
    publish(stack, end, *arguments, task=task)

    wait_for_all(stack, end, times * len(POOLS))
    for node in stack.nodes:
        node.says(line)
    nothing_more_runs(stack, end, times * len(POOLS))


def test_whoever_broadcasts_what_no_node_hears_is_told(stack: Stack) -> None:
    answer = publish(stack, "unheard", routing_key="elsewhere")

    assert "no node hears what is broadcast to everybody with routing key elsewhere" in answer.stderr


def test_a_broadcast_that_kills_its_child_is_not_run_again_and_the_log_says_so(harness: Harness) -> None:
    stack = stack_in(harness)
    node = start(stack, "prefork").says(READY)
    listens(stack, "prefork")

    publish(stack, "kills", task="probe.die")

    node.says("is not run again, because it was a broadcast: the process that ran it died")
    publish(stack, "after-kills")
    harness.wait_started("after-kills")
    assert harness.started("kills") == 1


def test_a_busy_node_hears_a_broadcast_and_rests(harness: Harness) -> None:
    stack = stack_in(harness)
    pools = ("prefork", "threads")
    for pool in pools:
        start(stack, pool, options="-c 1 --prefetch-multiplier=1")
    for node, pool in zip(stack.nodes, pools, strict=True):
        node.says(READY)
        stack.send("probe.hold", f"held-{pool}", queue=pool)
        harness.wait_started(f"held-{pool}")

    publish(stack, "told")

    for node in stack.nodes:
        node.says(r"Task odd_tasks\.tell\[\S+\] received")
    before = sum(map(cpu_seconds, stack.nodes))
    harness.holds_for(lambda: sum(map(cpu_seconds, stack.nodes)) < before + 1, 2, "none turns in circles")
    assert harness.started("told") == 0
    # What waits for a place of the pool outlives its connection.
    cut_off(stack, READY)
    for node in stack.nodes:
        node.says("consumer: waiting for")
    for pool in pools:
        harness.release(f"held-{pool}")
    wait_for_all(stack, "told", len(pools))


def test_a_broadcast_that_waits_for_its_time_outlives_the_connection(stack: Stack) -> None:
    task_id = publish(stack, "kept", countdown=4).stdout.split()[1]

    cut_off(stack, rf"{task_id}\] received")
    wait_for_all(stack, "kept")
    # The tests after this one broadcast as well.
    listens(stack, *POOLS)


def cut_off(stack: Stack, when: str) -> None:
    """End all connections to Redis when each node has said something."""
    for node in stack.nodes:
        node.says(when)
    for kind in ("normal", "pubsub"):
        stack.redis.client().client_kill_filter(_type=kind, skipme=True)


def test_nothing_that_is_broadcast_ends_a_node(stack: Stack) -> None:
    stack.redis.client().publish("/0.everybody/celery", "[" * 100_000)
    for count in ("x", None, 7):
        publish(stack, f"counted-{count}", headers={"delivery_count": count, "requeue_count": count})

    for count in ("x", None, 7):
        wait_for_all(stack, f"counted-{count}")
    for node in stack.nodes:
        assert "delivery 7" not in node.process.log()


@pytest.mark.parametrize("pool", POOLS)
def test_a_queue_without_acknowledgements_is_run(stack: Stack, pool: str) -> None:
    """It is off Redis when it is received, and nobody asks for its lease."""
    own = start(stack, pool, f"{pool}-noack", "unacknowledged").says(READY)
    # Nor does the node end with what is no message.
    stack.redis.client().lpush("unacknowledged", "[]", "[" * 100_000)

    publish(stack, f"noack-{pool}", queue="unacknowledged")

    stack.harness.wait_started(f"noack-{pool}")
    own.says(r"Task odd_tasks\.tell\[\S+\] succeeded")
    assert "its lease was lost" not in own.process.log()
    stop(own)


def test_two_stacks_on_one_server_do_not_hear_each_other(harness: Harness) -> None:
    redis = harness.redis()
    stacks = []
    for databases in ((0, 1), (2, 3)):
        broker, results = (redis.url(database, password="") for database in databases)
        stacks.append(stack_in(harness, redis, CELERY_BROKER_URL=broker, CELERY_RESULT_BACKEND=results))
        start(stacks[-1], "threads", options="-l debug").says(READY)
        listens(stacks[-1], "threads")

    for number, stack in enumerate(stacks):
        publish(stack, f"to-{number}")
        # Whoever hears it has heard the one before.
        publish(stack, f"and-to-{number}")

    for stack in stacks:
        stack.nodes[0].says(r"Task odd_tasks\.tell\[\S+\] succeeded", times=2)
    for number in (0, 1):
        assert [harness.started(f"{label}-{number}") for label in ("to", "and-to")] == [1, 1]
    assert [stack.unacked() for stack in stacks] == [0, 0]

    ours, theirs = stacks
    for stack in stacks:
        assert len(stack.client.control.ping(timeout=TIMEOUT_SECONDS, limit=1)) == 1
    # A stop that is meant for one stack would end the other too.
    ours.client.control.shutdown()
    assert ours.nodes[0].exits(TIMEOUT_SECONDS) == 0
    assert len(theirs.client.control.ping(timeout=TIMEOUT_SECONDS, limit=1)) == 1
    # Each has heard its own stack's, and no more.
    assert [stack.nodes[0].process.count("pidbox received method ping") for stack in stacks] == [1, 2]
    assert theirs.nodes[0].process.alive
