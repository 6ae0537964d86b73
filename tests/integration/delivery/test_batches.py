"""Several messages that run as one, as with celery-batches: each of them is delivered as any other task."""

import json
from base64 import b64decode
from typing import Any

import pytest

from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

# By where they keep what is not in a batch yet: with the connection, or beyond it.
KINDS = ("in_batches", "in_kept_batches")


@pytest.fixture(scope="module")
def cut(odd_world: Harness) -> Stack:
    """Nodes of each pool with half a batch of each kind, which have been cut off, and have connected again."""
    stack = odd_world.stack(CELERY_IMPORTS="probe,odd_tasks")
    client = stack.redis.client()
    for pool in POOLS:
        stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool, WORKER_PREFETCH_MULTIPLIER="4")
    for node in stack.nodes:
        node.ready()
    for pool in POOLS:
        for kind in KINDS:
            stack.send(f"odd_tasks.{kind}", f"{pool}-{kind}-first", "ends", queue=pool)
        stack.send("probe.mark", f"{pool}-behind", queue=pool)
    # What is unacknowledged in Redis may still be on its way to the node; what ran behind it shows that it is there.
    for pool in POOLS:
        odd_world.wait_until(lambda: odd_world.ended(f"{pool}-behind"), TIMEOUT_SECONDS, "its node has both")  # noqa: B023
    half = len(POOLS) * len(KINDS)
    odd_world.wait_until(lambda: stack.unacked() == half, TIMEOUT_SECONDS, "each has half a batch")
    before = set(client.hkeys("unacked"))

    for kind in ("normal", "pubsub"):
        client.client_kill_filter(_type=kind, skipme=True)

    def again() -> bool:
        now = {pool: unacked(stack, pool) for pool in POOLS}
        # The other kind is whole, and ends: what is no delivery any more, and the same as it came again.
        return not before & {tag for tags in now.values() for tag in tags} and all(
            list(tags.values()) == [f"{pool}-in_batches-first"] for pool, tags in now.items()
        )

    odd_world.wait_until(again, TIMEOUT_SECONDS, "each has been given it again")
    return stack


def unacked(stack: Stack, queue: str) -> dict[str, str]:
    """The tags and labels of a queue's unacknowledged messages."""
    found: Any = stack.redis.client().hgetall("unacked")
    messages = {tag: json.loads(text) for tag, text in found.items()}
    return {
        tag: json.loads(b64decode(message["body"]))[0][0]
        for tag, (message, _, origin) in messages.items()
        if origin == queue
    }


@pytest.mark.parametrize("pool", POOLS)
def test_a_message_that_was_kept_for_its_batch_when_the_connection_broke_runs_once(cut: Stack, pool: str) -> None:
    # Of the one that came twice, the delivery runs that is unacknowledged now.
    assert cut.harness.started(f"{pool}-in_kept_batches-first") == 1

    cut.send("odd_tasks.in_batches", f"{pool}-second", "ends", queue=pool)

    cut.harness.wait_until(lambda: not unacked(cut, pool), TIMEOUT_SECONDS, "the batch is acknowledged")
    assert [cut.harness.started(f"{pool}-{label}") for label in ("in_batches-first", "second")] == [1, 1]


def test_a_batch_of_messages_that_need_no_acknowledgement_runs(cut: Stack) -> None:
    """They are claimed with those of the other queue, are off Redis when they are received, and under no lease."""
    options = "-P threads -Q leased,unacknowledged -n unacknowledged@%h -l info"
    node = cut.celery(f"worker {options}", CELERY_IMPORTS="probe,odd_tasks,odd_broadcast").says(r"\S+@\S+ ready\.")

    for number in range(2):
        cut.send("odd_tasks.in_batches", f"free-{number}", "ends", queue="unacknowledged")

    for number in range(2):
        cut.harness.wait_started(f"free-{number}")
    assert "is left out of its batch" not in node.process.log()
