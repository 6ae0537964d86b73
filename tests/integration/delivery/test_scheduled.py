"""Tasks with a time far ahead wait in Redis: in nobody's memory, in nobody's way, and known to whoever asks."""

from __future__ import annotations

import json
import os
import re
import signal
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
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.processes import children, command_line
from tests.support.world import Node, Stack, World

PATIENCE = 120
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
def stack(shared_world: World) -> Stack:
    """A worker that runs one task at a time."""
    stack = shared_world.stack(WORKER_LEASE=str(LEASE))
    stack.worker().ready()
    return stack


@pytest.fixture
def quiet(world: World) -> Stack:
    """A Redis without workers."""
    return world.stack(WORKER_LEASE=str(LEASE))


def scheduled(stack: Stack) -> int:
    """How many tasks wait in Redis for their time."""
    with stack.redis.client().pipeline() as pipe:
        pipe.zcard(SCHEDULED)
        pipe.hlen(SCHEDULED_MESSAGES)
        indexed, kept = pipe.execute()
    assert indexed == kept, f"{kept} messages, {indexed} with a time"
    return int(kept)


def wait_scheduled(stack: Stack, count: int, timeout: float = PATIENCE) -> None:
    stack.world.wait_until(lambda: scheduled(stack) == count, timeout, f"{count} tasks wait in Redis")


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
    stack.world.wait_started("heard")
    return worker


def waiting(stack: Stack, queue: str = "celery") -> list[str]:
    """The ids of the tasks that wait in a queue, all priorities together."""
    with stack.redis.client() as client:
        return [json.loads(text)["headers"]["id"] for key in get_lists(queue) for text in client.lrange(key, 0, -1)]


@pytest.fixture(autouse=True)
def nothing_scheduled(request: pytest.FixtureRequest) -> None:
    """Tests that share a worker count what is there."""
    if "stack" in request.fixturenames:
        with request.getfixturevalue("stack").redis.client() as client:
            client.delete(SCHEDULED, SCHEDULED_MESSAGES)


def memory(worker: Node) -> int:
    """Resident bytes of a worker's Celery node, its children not counted."""
    (node,) = (pid for pid in children(worker.process.pid) if "--hostname=node0@" in command_line(pid))
    pages = int(Path(f"/proc/{node}/statm").read_text().split()[1])
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

    stack.world.wait_started(f"between-{many}")
    stack.world.wait_until(lambda: stack.waiting() + stack.unacked() == 0, PATIENCE, "nobody holds any")
    assert stack.world.started(f"between-{many}") == 1
    assert memory(stack.nodes[0]) - before < GROWTH_BYTES
    stack.send("probe.mark", f"at-once-{many}")
    stack.world.wait_started(f"at-once-{many}")
    assert services(stack, "status").said["scheduled"] == many + 1


def check_turns(stack: Stack, pool: str) -> None:
    sent = {f"{pool}-{number}": later(stack, f"{pool}-{number}") for number in range(10)}
    later(stack, "far")
    wait_scheduled(stack, len(sent) + 1)

    moment = make_due(stack, *sent.values(), seconds=SOON_SECONDS)

    for label in sent:
        stack.world.wait_started(label)
        ((_, _, began),) = stack.world.notes("start", label)
        assert began > moment - EARLY_SECONDS
    # The next one of those that are due is always the one that has been due for longest.
    started = [label for label, _, _ in stack.world.notes("start") if label in sent]
    assert started == list(sent)
    # What is not due has not come along.
    assert scheduled(stack) == 1


def test_what_is_due_starts_in_its_turn_and_not_before(stack: Stack) -> None:
    check_turns(stack, "prefork")


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_what_is_due_starts_in_its_turn_in_other_pools_too(quiet: Stack, pool: str) -> None:
    start(quiet, pool).ready()
    check_turns(quiet, pool)


def test_a_due_task_starts_although_every_place_of_its_first_worker_is_taken(stack: Stack) -> None:
    other = start(stack, name="other", queues="other")
    other.says("other@.* ready")
    beside = later(stack, "beside", queue="other")
    wait_scheduled(stack, 1)
    other.process.end()

    make_due(stack, beside)

    # Its own worker is gone; any other puts it back, and a new one of its queue runs it.
    stack.world.wait_until(lambda: waiting(stack, "other"), PATIENCE, "it is back in its queue")


def test_a_restart_of_everything_loses_none_and_doubles_none(quiet: Stack) -> None:
    first = quiet.worker().ready()
    labels = [f"survivor-{number}" for number in range(20)]
    sent = [later(quiet, label) for label in labels]
    wait_scheduled(quiet, len(labels))
    first.process.end()
    quiet.redis.kill()
    quiet.redis.start()
    make_due(quiet, *sent)

    quiet.worker().ready()

    quiet.world.wait_until(lambda: all(map(quiet.world.started, labels)), PATIENCE, "all run")
    assert [quiet.world.started(label) for label in labels] == [1] * len(labels)


def test_one_task_can_wait_twice(stack: Stack) -> None:
    task_id = str(uuid4())
    for number in range(3):
        later(stack, f"twin-{number}", task_id=task_id)
    wait_scheduled(stack, 3)

    stack.client.control.revoke(task_id)

    wait_scheduled(stack, 0)


# Remote control.


def test_inspect_shows_what_waits_in_redis_the_next_one_first(stack: Stack) -> None:
    sent_at = time()
    near, far = later(stack, "near", HOUR), later(stack, "far", 2 * HOUR)
    later(stack, "of-others", queue="nobody")
    wait_scheduled(stack, 2)
    start(stack, name="nobody", queues="nobody").says("nobody@.* ready")
    wait_scheduled(stack, 3)

    (found,) = stack.client.control.inspect([NODE], timeout=PATIENCE).scheduled().values()

    assert [one["request"]["id"] for one in found] == [near.id, far.id]
    one = found[0]
    assert abs(datetime.fromisoformat(one["eta"]).timestamp() - sent_at - HOUR) < PATIENCE
    assert (one["request"]["name"], one["request"]["args"], one["request"]["kwargs"]) == ("probe.mark", ["near"], {})


@pytest.mark.slow
def test_inspect_shows_as_many_as_somebody_reads(stack: Stack) -> None:
    for number in range(1010):
        later(stack, f"one-of-many-{number}")
    wait_scheduled(stack, 1010, MANY_SECONDS)

    (found,) = stack.client.control.inspect([NODE], timeout=PATIENCE).scheduled().values()

    # Whichever comes first: a thousand, or the message with which there is a megabyte.
    with redis.Redis(port=stack.redis.port, password=stack.redis.password) as client:
        records = client.hmget(SCHEDULED_MESSAGES, client.zrange(SCHEDULED, 0, -1))
    together = list(accumulate(len(extract_message(record)) for record in records))
    assert len(found) == min(MAX_LISTED, sum(bytes_before < MAX_LISTED_BYTES for bytes_before in [0, *together[:-1]]))


def test_query_task_finds_what_waits_in_redis(stack: Stack) -> None:
    sent = later(stack, "asked-for")
    wait_scheduled(stack, 1)

    answers = stack.client.control.inspect([NODE], timeout=PATIENCE).query_task(sent.id)

    assert answers[NODE][sent.id][0] == "scheduled"


def test_a_revoked_task_leaves_redis_at_once_and_one_worker_says_so(quiet: Stack) -> None:
    for name in ("one", "two", "three"):
        start(quiet, name=name)
    for node, name in zip(quiet.nodes, ("one", "two", "three"), strict=True):
        node.says(f"{name}@.* ready")
    sent, other = later(quiet, "revoked"), later(quiet, "kept")
    wait_scheduled(quiet, 2)

    with events(quiet) as seen:
        sent.revoke()
        wait_scheduled(quiet, 1)
        quiet.world.wait_until(lambda: sent.state == "REVOKED", PATIENCE, "it says REVOKED")
        # An event of every worker that is later than any of the revocation.
        enough = len(seen)
        quiet.world.wait_until(
            lambda: len({event["hostname"] for event in seen[enough:]}) == 3, PATIENCE, "a sign of life of each"
        )
        revoked = [event["uuid"] for event in seen if event["type"] == "task-revoked"]

    assert revoked == [sent.id]
    assert other.state == "PENDING"


def test_a_revoked_task_stays_so_when_all_workers_are_started_again(quiet: Stack) -> None:
    worker = listening(quiet)
    sent = [later(quiet, "revoked") for _ in range(10)]
    # As it comes: some wait in Redis already, some are on their way there, some have not arrived.
    for one in sent:
        one.revoke()
    quiet.world.wait_until(lambda: all(one.state == "REVOKED" for one in sent), PATIENCE, "all say REVOKED")
    # In the order in which a task passes through them.
    quiet.world.wait_until(
        lambda: quiet.waiting() + quiet.unacked() + scheduled(quiet) == 0, PATIENCE, "nothing is left"
    )
    worker.process.end()

    start(quiet).ready()

    quiet.world.holds_for(
        lambda: not quiet.world.started("revoked") and not scheduled(quiet), 2 * LEASE, "none runs or waits again"
    )


def test_a_task_that_is_revoked_before_it_arrives_is_not_put_away(quiet: Stack) -> None:
    listening(quiet)
    task_id = str(uuid4())
    quiet.client.control.revoke(task_id, reply=True, timeout=PATIENCE, limit=1)

    sent = later(quiet, "too-late", task_id=task_id)

    quiet.world.wait_until(lambda: sent.state == "REVOKED", PATIENCE, "it says REVOKED")
    quiet.world.wait_until(lambda: quiet.waiting() + quiet.unacked() == 0, PATIENCE, "nothing is left")
    assert scheduled(quiet) == 0


def test_a_chord_errs_whose_part_is_revoked_while_it_waits(stack: Stack) -> None:
    parts = [stack.client.signature("probe.mark", args=[label], options={"countdown": HOUR}) for label in ("a", "b")]
    sent = chord(parts, app=stack.client)(stack.client.signature("probe.mark"))
    wait_scheduled(stack, 2)

    stack.client.control.revoke([part.id for part in sent.parent.results])

    body = stack.client.AsyncResult(sent.id)
    stack.world.wait_until(lambda: body.state == "FAILURE", PATIENCE, "its body fails")
    # They are marked as revoked first, and then taken out.
    wait_scheduled(stack, 0)


# Purge.


def test_purging_a_queue_takes_what_waits_for_its_time_along(quiet: Stack) -> None:
    worker = start(quiet, name="node0", queues="mail,other").ready()
    for number in range(1200):
        later(quiet, f"purged-{number}", queue="mail")
    kept = later(quiet, "kept", queue="other", ignore_result=False)
    wait_scheduled(quiet, 1201, MANY_SECONDS)
    worker.process.end()
    quiet.send("probe.mark", "purged", queue="mail")

    purge = quiet.celery("purge --force --queues mail")

    assert purge.exits(PATIENCE) == 0
    purge.says("Purged 1201 messages")
    assert quiet.waiting("mail") == 0
    make_due(quiet, kept)
    start(quiet, name="node0", queues="mail,other")
    assert kept.get(timeout=PATIENCE) == "kept"


# The way back.


def stock_worker(stack: Stack) -> Node:
    """A worker of Celery's own, with the same tasks on the same Redis."""
    directory = stack.world.path("stock")
    directory.mkdir()
    (directory / "stock.py").write_text(
        "from celery import Celery\napp = Celery('stock', include=['probe'])\napp.conf.task_acks_late = True\n"
    )
    urls = {"CELERY_BROKER_URL": stack.redis.url(0), "CELERY_RESULT_BACKEND": stack.redis.url(1)}
    environment = stack.environment(**urls, PYTHONPATH=str(stack.world.checkout.path))
    command = "-m celery -A stock worker --pool=solo --hostname=node0@%h"
    process = stack.world.python("stock", command, environment, directory, LIBRARIES_ONLY)
    return Node(stack.world, process, environment)


def test_the_way_back_to_stock_workers_is_refused_while_stalks_live(quiet: Stack) -> None:
    start(quiet).ready()
    later(quiet, "far")
    wait_scheduled(quiet, 1)

    answer = services(quiet, "to-plain")

    assert answer.code == 1
    stop = "stop Stalk's workers first, with 'make scale WORKERS=0' for instance"
    assert answer.said["error"] == f"{NODE} would take it in again: {stop}"
    assert scheduled(quiet) == 1


def test_stock_workers_go_on_with_all_that_was_left(quiet: Stack) -> None:
    worker = quiet.celery("worker --loglevel=info --pool=threads --concurrency=2 --hostname=node0@%h").ready()
    quiet.send("probe.hold", "cut-off")
    quiet.world.wait_started("cut-off")
    soon, urgent = later(quiet, "soon"), later(quiet, "urgent", HOUR, priority=9)
    far = [later(quiet, f"far-{number}", HOUR + number) for number in range(3)]
    wait_scheduled(quiet, 5)
    worker.process.end()
    make_due(quiet, soon)
    client: Any = quiet.redis.client()
    (held,) = client.zrange(UNACKED_LEASES, 0, -1)
    # A lease that runs out when the test wants it.
    client.zadd(UNACKED_LEASES, {held: time() + HOUR})
    early = services(quiet, "to-plain")
    client.zadd(UNACKED_LEASES, {held: time()})

    late = services(quiet, "to-plain")

    # What waits for its time need not wait for the lease of the dead.
    assert (early.code, early.said["scheduled"], early.said["restored"]) == (1, 5, 0)
    assert early.said["error"].startswith("1 tasks still belong to workers that do not answer")
    assert (late.code, late.said) == (0, {"scheduled": 0, "restored": 1})
    assert client.exists(SCHEDULED, SCHEDULED_MESSAGES, UNACKED, UNACKED_LEASES) == 0
    # The right end is taken first: what was cut off, then what is due first.
    assert waiting(quiet)[:-2] == [one.id for one in (*far[::-1], soon)][: len(waiting(quiet)) - 2]
    assert urgent.id in waiting(quiet)
    quiet.world.release("cut-off")
    stock_worker(quiet)
    quiet.world.wait_until(lambda: quiet.world.started("cut-off") == 2, PATIENCE, "a stock worker runs it again")
    quiet.world.wait_until(lambda: quiet.world.ended("soon") == 1, PATIENCE, "and what is due")


def test_a_worker_that_was_stopped_leaves_nothing_that_has_to_be_brought_back(quiet: Stack) -> None:
    worker = start(quiet).ready()
    worker.process.signal(signal.SIGTERM)
    assert worker.exits(PATIENCE) == 0

    answer = services(quiet, "to-plain")

    assert (answer.code, answer.said) == (0, {"scheduled": 0, "restored": 0})
