"""Tasks with a time far ahead wait in Redis: in nobody's memory, in nobody's way, and known to whoever asks."""

import json
import os
import re
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import chord

from services.broker.keys import SCHEDULED, SCHEDULED_MESSAGES, UNACKED, UNACKED_LEASES, get_lists
from services.broker.messages import extract_message
from services.delayed.scheduled import MAX_LISTED, MAX_LISTED_BYTES
from tests.integration.commands.test_call import services
from tests.integration.results.test_dead_letters import events
from tests.integration.worker.test_worker import node_process
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.harness import Harness, Node, Stack
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

LEASE = 3
HOUR = 3600
# Ten thousand take half a minute.
MANY = (500, pytest.param(10_000, marks=pytest.mark.slow))
# Sending takes a client half a millisecond a task, and a worker to put it away no longer; beside load ten times that.
MANY_SECONDS = 600
# What a worker may grow by while it puts them away.
GROWTH_BYTES = 10 * 2**20
# Longer than a worker takes to see that something became due, which it does three times in a lease.
SOON_SECONDS = 3
# How exactly the clocks of Redis and of a worker agree, which are the same machine's.
EARLY_SECONDS = 0.01
NODE = f"node0@{os.uname().nodename}"


@pytest.fixture(scope="module")
def shared_stack(shared_harness: Harness) -> Stack:
    stack = shared_harness.stack(WORKER_LEASE=str(LEASE))
    stack.worker().ready()
    return stack


@pytest.fixture
def stack(shared_stack: Stack) -> Stack:
    """A worker that runs one task at a time; nothing is scheduled."""
    shared_stack.redis.client().delete(SCHEDULED, SCHEDULED_MESSAGES)
    return shared_stack


@pytest.fixture
def bare(harness: Harness) -> Stack:
    """A Redis without workers."""
    return harness.stack(WORKER_LEASE=str(LEASE))


def count_scheduled(stack: Stack) -> int:
    """How many tasks wait in Redis for their time."""
    with stack.redis.client().pipeline() as pipe:
        pipe.zcard(SCHEDULED)
        pipe.hlen(SCHEDULED_MESSAGES)
        indexed, kept = pipe.execute()
    assert indexed == kept, f"{kept} messages, {indexed} with a time"
    return int(kept)


def wait_scheduled(stack: Stack, count: int, timeout: float = TIMEOUT_SECONDS) -> None:
    stack.harness.wait_until(lambda: count_scheduled(stack) == count, timeout, f"{count} tasks wait in Redis")


def later(stack: Stack, label: str, seconds: float = HOUR, **options: Any) -> Any:
    # A result that somebody may wait for asks Redis when it is collected, be that after its end.
    return stack.send("probe.mark", label, countdown=seconds, **{"ignore_result": True, **options})


def make_due(stack: Stack, *sent: Any, seconds: float = 0.0) -> float:
    """Let tasks that wait in Redis be due as if they had been sent so, one after another. Returns when the first is.

    So it does not matter how long they took to get there. Whoever takes them looks at the time in the message as well.
    """
    moment = time() + seconds
    with stack.redis.client() as client, client.pipeline() as pipe:
        for number, one in enumerate(sent):
            # Within less time than passes between two sweeps: all of them go back in the same one.
            due = moment + number / 100_000
            # Further apart, and before: for its timer Celery reads two clocks one after the other.
            date = datetime.fromtimestamp(moment - (len(sent) - number) / 100, UTC)
            eta = f'"eta": "{date.isoformat()}"'
            record, changed = re.subn('"eta": "[^"]+"', eta, str(client.hget(SCHEDULED_MESSAGES, one.id)))
            assert changed == 1, record
            pipe.hset(SCHEDULED_MESSAGES, one.id, record)
            pipe.zadd(SCHEDULED, {one.id: due})
        pipe.execute()
    return moment


def start(
    stack: Stack, pool: str = "solo", name: str = "node0", queues: str = "celery", more: str = "", **settings: str
) -> Node:
    """A node that runs one task at a time, with nothing that would replace it."""
    options = f"--loglevel=info --pool={pool} --concurrency=1 --queues={queues} --hostname={name}@%h {more}"
    return stack.celery(f"worker {options}", **settings)


def listening(stack: Stack) -> Node:
    """A worker that hears what is broadcast: it says that it is ready a moment before it does."""
    worker = start(stack)
    stack.send("probe.mark", "heard")
    stack.harness.wait_started("heard")
    return worker


def list_waiting(stack: Stack, queue: str = "celery") -> list[str]:
    """The ids of the tasks that wait in a queue, all priorities together."""
    with stack.redis.client() as client:
        return [json.loads(text)["headers"]["id"] for key in get_lists(queue) for text in client.lrange(key, 0, -1)]


def memory(worker: Node) -> int:
    """Resident bytes of a worker's Celery node, its children not counted."""
    pages = int(Path(f"/proc/{node_process(worker, 'node0')}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("many", MANY)
def test_many_of_them_are_in_nobodys_memory_and_in_nobodys_way(stack: Stack, many: int) -> None:
    later(stack, "first")
    wait_scheduled(stack, 1)
    before = memory(stack.nodes[0])

    for number in range(many):
        later(stack, f"far-{number}")
        if number == many // 2:
            stack.send("probe.mark", f"between-{many}")
    wait_scheduled(stack, many + 1, MANY_SECONDS)

    stack.harness.wait_started(f"between-{many}")
    stack.harness.wait_until(lambda: stack.waiting() + stack.unacked() == 0, TIMEOUT_SECONDS, "nobody holds any")
    assert stack.harness.started(f"between-{many}") == 1
    assert memory(stack.nodes[0]) - before < GROWTH_BYTES
    stack.send("probe.mark", f"at-once-{many}")
    stack.harness.wait_started(f"at-once-{many}")
    assert services(stack, "status").data["scheduled"] == many + 1


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_due_starts_in_its_turn_and_not_before(bare: Stack, pool: str) -> None:
    start(bare, pool).ready()
    sent = {f"due-{number}": later(bare, f"due-{number}") for number in range(10)}
    later(bare, "far")
    wait_scheduled(bare, len(sent) + 1)

    moment = make_due(bare, *sent.values(), seconds=SOON_SECONDS)

    for label in sent:
        bare.harness.wait_started(label)
        ((_, _, began),) = bare.harness.notes("start", label)
        assert began > moment - EARLY_SECONDS
    # The next one of those that are due is always the one that has been due for longest.
    assert [label for label, _, _ in bare.harness.notes("start")] == list(sent)
    # What is not due has not come along.
    assert count_scheduled(bare) == 1


def test_a_restart_of_everything_loses_none_and_doubles_none(bare: Stack) -> None:
    first = bare.worker().ready()
    labels = [f"survivor-{number}" for number in range(20)]
    sent = [later(bare, label) for label in labels]
    wait_scheduled(bare, len(labels))
    first.process.end()
    bare.redis.kill()
    bare.redis.start()
    make_due(bare, *sent)

    bare.worker().ready()

    bare.harness.wait_until(lambda: all(map(bare.harness.started, labels)), TIMEOUT_SECONDS, "all run")
    assert [bare.harness.started(label) for label in labels] == [1] * len(labels)


# Remote control.


def test_a_node_shows_what_waits_for_its_queues_and_puts_back_what_is_due_of_others(stack: Stack) -> None:
    sent_at = time()
    near, far = later(stack, "near", HOUR), later(stack, "far", 2 * HOUR)
    of_other = later(stack, "of-other", queue="other")
    other = start(stack, name="other", queues="other").says("other@.* ready")
    wait_scheduled(stack, 3)

    (found,) = stack.client.control.inspect([NODE], timeout=TIMEOUT_SECONDS).scheduled().values()

    assert [one["request"]["id"] for one in found] == [near.id, far.id]
    one = found[0]
    assert abs(datetime.fromisoformat(one["eta"]).timestamp() - sent_at - HOUR) < TIMEOUT_SECONDS
    assert (one["request"]["name"], one["request"]["args"], one["request"]["kwargs"]) == ("probe.mark", ["near"], {})
    other.process.end()
    make_due(stack, of_other)
    # A new worker of its queue would run it.
    stack.harness.wait_until(lambda: list_waiting(stack, "other"), TIMEOUT_SECONDS, "it is back in its queue")


@pytest.mark.slow
def test_inspect_shows_as_many_as_somebody_reads(stack: Stack) -> None:
    for number in range(1010):
        later(stack, f"one-of-many-{number}")
    wait_scheduled(stack, 1010, MANY_SECONDS)

    (found,) = stack.client.control.inspect([NODE], timeout=TIMEOUT_SECONDS).scheduled().values()

    # Whichever comes first: a thousand, or the message with which there is a megabyte.
    with redis.Redis(port=stack.redis.port, password=stack.redis.password) as client:
        records = client.hmget(SCHEDULED_MESSAGES, client.zrange(SCHEDULED, 0, -1))
    together = list(accumulate(len(extract_message(record)) for record in records))
    assert len(found) == min(MAX_LISTED, sum(bytes_before < MAX_LISTED_BYTES for bytes_before in [0, *together[:-1]]))


def test_what_waits_in_redis_is_found_and_revoked_by_its_id_however_often_it_waits(stack: Stack) -> None:
    task_id = str(uuid4())
    for number in range(3):
        later(stack, f"triplet-{number}", task_id=task_id)
    wait_scheduled(stack, 3)

    answers = stack.client.control.inspect([NODE], timeout=TIMEOUT_SECONDS).query_task(task_id)

    assert answers[NODE][task_id][0] == "scheduled"
    stack.client.control.revoke(task_id)
    wait_scheduled(stack, 0)


def test_a_revoked_task_leaves_redis_at_once_and_one_worker_says_so(bare: Stack) -> None:
    names = ("one", "two", "three")
    for node, name in [(start(bare, name=name), name) for name in names]:
        node.says(f"{name}@.* ready")
    sent, other = later(bare, "revoked"), later(bare, "kept")
    wait_scheduled(bare, 2)

    with events(bare) as heard:
        sent.revoke()
        wait_scheduled(bare, 1)
        bare.harness.wait_until(lambda: sent.state == "REVOKED", TIMEOUT_SECONDS, "it says REVOKED")
        # An event of every worker that is later than any of the revocation.
        enough = len(heard)
        bare.harness.wait_until(
            lambda: len({event["hostname"] for event in heard[enough:]}) == 3, TIMEOUT_SECONDS, "a sign of life of each"
        )
        revoked = [event["uuid"] for event in heard if event["type"] == "task-revoked"]

    assert revoked == [sent.id]
    assert other.state == "PENDING"


def test_a_revoked_task_stays_so_before_it_arrives_and_when_all_workers_are_started_again(bare: Stack) -> None:
    worker = listening(bare)
    early = str(uuid4())
    bare.client.control.revoke(early, reply=True, timeout=TIMEOUT_SECONDS, limit=1)
    sent = [later(bare, "revoked", task_id=early), *(later(bare, "revoked") for _ in range(10))]
    # As it comes: some wait in Redis already, some are on their way there, some have not arrived.
    for one in sent[1:]:
        one.revoke()
    bare.harness.wait_until(lambda: all(one.state == "REVOKED" for one in sent), TIMEOUT_SECONDS, "all say REVOKED")
    # In the order in which a task passes through them.
    none_is_there = lambda: bare.waiting() + bare.unacked() + count_scheduled(bare) == 0  # noqa: E731
    bare.harness.wait_until(none_is_there, TIMEOUT_SECONDS, "nothing waits")
    worker.process.end()

    start(bare).ready()

    bare.harness.holds_for(
        lambda: not bare.harness.started("revoked") and not count_scheduled(bare), 2 * LEASE, "none runs or waits again"
    )


def test_a_chord_errs_whose_part_is_revoked_while_it_waits(stack: Stack) -> None:
    parts = [stack.client.signature("probe.mark", args=[label], options={"countdown": HOUR}) for label in ("a", "b")]
    sent = chord(parts, app=stack.client)(stack.client.signature("probe.mark"))
    wait_scheduled(stack, 2)

    stack.client.control.revoke([part.id for part in sent.parent.results])

    body = stack.client.AsyncResult(sent.id)
    stack.harness.wait_until(lambda: body.state == "FAILURE", TIMEOUT_SECONDS, "its body fails")
    # They are marked as revoked first, and then taken out.
    wait_scheduled(stack, 0)


# Purge.


def test_purging_a_queue_takes_what_waits_for_its_time_along(bare: Stack) -> None:
    worker = start(bare, name="node0", queues="mail,other").ready()
    for number in range(1200):
        later(bare, f"purged-{number}", queue="mail")
    kept = later(bare, "kept", queue="other", ignore_result=False)
    wait_scheduled(bare, 1201, MANY_SECONDS)
    worker.process.end()
    bare.send("probe.mark", "purged", queue="mail")

    purge = bare.celery("purge --force --queues mail")

    assert purge.exits(TIMEOUT_SECONDS) == 0
    purge.says("Purged 1201 messages")
    assert bare.waiting("mail") == 0
    make_due(bare, kept)
    start(bare, name="node0", queues="mail,other")
    assert kept.get(timeout=TIMEOUT_SECONDS) == "kept"


# The way back.


def stock_worker(stack: Stack) -> Node:
    """A worker of Celery's own, with the same tasks on the same Redis."""
    directory = stack.harness.path("stock")
    directory.mkdir()
    (directory / "stock.py").write_text(
        "from celery import Celery\napp = Celery('stock', include=['probe'])\napp.conf.task_acks_late = True\n"
    )
    urls = {"CELERY_BROKER_URL": stack.redis.url(0), "CELERY_RESULT_BACKEND": stack.redis.url(1)}
    environment = stack.environment(**urls, PYTHONPATH=str(stack.harness.checkout.path))
    command = "-m celery -A stock worker --pool=solo --hostname=node0@%h"
    process = stack.harness.python("stock", command, environment, directory, LIBRARIES_ONLY)
    return Node(stack.harness, process, environment)


def test_the_way_back_to_stock_workers_is_refused_while_stalks_live(bare: Stack) -> None:
    worker = start(bare).ready()
    far = later(bare, "far")
    wait_scheduled(bare, 1)

    refused = services(bare, "to-plain")

    assert refused.code == 1
    stop = "stop Stalk's workers first, with 'make scale WORKERS=0' for instance"
    assert refused.data["error"] == f"{NODE} would take it in again: {stop}"
    assert count_scheduled(bare) == 1
    far.revoke()
    wait_scheduled(bare, 0)
    worker.process.terminate()
    assert worker.exits(TIMEOUT_SECONDS) == 0
    answer = services(bare, "to-plain")
    assert (answer.code, answer.data) == (0, {"scheduled": 0, "restored": 0})


def test_stock_workers_go_on_with_all_that_was_left(bare: Stack) -> None:
    worker = bare.celery("worker --loglevel=info --pool=threads --concurrency=2 --hostname=node0@%h").ready()
    bare.send("probe.hold", "cut-off")
    bare.harness.wait_started("cut-off")
    soon, urgent = later(bare, "soon"), later(bare, "urgent", HOUR, priority=9)
    far = [later(bare, f"far-{number}", HOUR + number) for number in range(3)]
    wait_scheduled(bare, 5)
    worker.process.end()
    make_due(bare, soon)
    client: Any = bare.redis.client()
    (lease,) = client.zrange(UNACKED_LEASES, 0, -1)
    # A lease that runs out when the test wants it.
    client.zadd(UNACKED_LEASES, {lease: time() + HOUR})
    early = services(bare, "to-plain")
    client.zadd(UNACKED_LEASES, {lease: time()})

    late = services(bare, "to-plain")

    # What waits for its time need not wait for the lease of the dead.
    assert (early.code, early.data["scheduled"], early.data["restored"]) == (1, 5, 0)
    assert early.data["error"].startswith("1 tasks still belong to workers that do not answer")
    assert (late.code, late.data) == (0, {"scheduled": 0, "restored": 1})
    assert client.exists(SCHEDULED, SCHEDULED_MESSAGES, UNACKED, UNACKED_LEASES) == 0
    # The right end is taken first: what was cut off, then what is due first.
    assert list_waiting(bare)[:-2] == [one.id for one in (*far[::-1], soon)][: len(list_waiting(bare)) - 2]
    assert urgent.id in list_waiting(bare)
    bare.harness.release("cut-off")
    stock_worker(bare)
    bare.harness.wait_until(
        lambda: bare.harness.started("cut-off") == 2, TIMEOUT_SECONDS, "a stock worker runs it again"
    )
    bare.harness.wait_until(lambda: bare.harness.ended("soon") == 1, TIMEOUT_SECONDS, "and what is due")
