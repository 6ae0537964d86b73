"""Beat: each entry on time and once, whatever happens to a beat, to its lock or to Redis."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from time import time

import pytest

from services.beat import LOCK_SECONDS
from tests.support.redis_server import RedisServer
from tests.support.world import Node, Stack, World

PATIENCE = 30
# Each second, which is the shortest period there is.
SCHEDULE = "report-free-space=1"
# A beat that stands by takes over within this time of its predecessor's death; what the README promises.
TAKEOVER_SECONDS = 30
# Two sendings of one entry are at least so far apart; a doubled one follows its twin within a tenth of a second.
APART_SECONDS = 0.5
WATCHED = 4


def sent(redis: RedisServer) -> list[float]:
    """When each task that waits in the default queue was sent, told by its expiry: one period later."""
    headers = [json.loads(text)["headers"] for text in redis.client().lrange("celery", 0, -1)]
    return sorted(datetime.fromisoformat(header["expires"]).timestamp() - 1 for header in headers)


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def sends(stack: Stack, more: int = 1) -> list[float]:
    """Wait until as many more tasks have been sent; the times of those."""
    before = len(sent(stack.redis))
    stack.world.wait_until(lambda: len(sent(stack.redis)) >= before + more, PATIENCE, f"beat sends {more} more tasks")
    return sent(stack.redis)[before:]


def word(beat: Node) -> str:
    """What a beat's heartbeat says."""
    path = beat.heartbeat("beat")
    return path.read_text().strip() if path.exists() else ""


@dataclass
class Succession:
    """Two beats, of which the one that held the lock was killed."""

    stack: Stack
    heir: Node
    words_before: set[str]
    sent_before: list[float]
    killed_at: float


@pytest.fixture(scope="module", autouse=True)
def succession(shared_world: World) -> Succession:
    """Two beats on one Redis; the one that has the lock is killed. Early, so that other tests run meanwhile."""
    stack = shared_world.stack(BEAT_SCHEDULE=SCHEDULE)
    beats = [stack.beat(), stack.beat()]
    shared_world.wait_until(
        lambda: {word(beat) for beat in beats} == {"ticking", "standby"}, PATIENCE, "one beat ticks, one stands by"
    )
    holder, heir = sorted(beats, key=word, reverse=True)
    times = sends(stack, WATCHED)
    words = {word(holder), word(heir)}
    holder.process.signal(signal.SIGKILL)
    return Succession(stack, heir, words, times, time())


def test_an_entry_is_sent_on_time_and_once_by_two_beats(succession: Succession) -> None:
    assert succession.words_before == {"ticking", "standby"}
    assert min(gaps(succession.sent_before)) > APART_SECONDS
    assert max(gaps(succession.sent_before)) < 1 + APART_SECONDS


@pytest.fixture(scope="module")
def stack(shared_world: World) -> Stack:
    """One beat, which several misfortunes befall one after another."""
    stack = shared_world.stack(BEAT_SCHEDULE=SCHEDULE)
    stack.beat()
    sends(stack)
    return stack


def test_a_schedule_survives_an_emptied_redis(stack: Stack) -> None:
    beat = stack.nodes[0]

    stack.redis.client().flushall()

    times = sends(stack, 3)
    assert min(gaps(times)) > APART_SECONDS
    assert beat.process.alive
    assert word(beat) == "ticking"
    assert stack.redis.client().exists("redbeat:report-free-space") == 1


def test_beat_survives_a_redis_that_goes_away(stack: Stack) -> None:
    world, beat = stack.world, stack.nodes[0]

    stack.redis.kill()
    world.wait_until(lambda: word(beat) == "waiting", PATIENCE, "beat says that it waits")
    touched = beat.heartbeat("beat").stat().st_mtime
    world.wait_until(lambda: beat.heartbeat("beat").stat().st_mtime > touched, PATIENCE, "beat is alive meanwhile")
    stack.redis.start()

    assert min(gaps(sends(stack, 3))) > APART_SECONDS
    assert beat.process.alive
    assert word(beat) == "ticking"


def test_a_beat_that_stops_gives_its_lock_away_and_the_next_removes_what_is_switched_off(stack: Stack) -> None:
    beat = stack.nodes[0]
    assert stack.redis.client().exists("redbeat:report-free-space") == 1

    beat.process.terminate()

    assert beat.exits(PATIENCE) == 0
    assert stack.redis.client().exists("redbeat:lock") == 0
    off = stack.beat(BEAT_SCHEDULE="report-free-space=off")
    stack.world.wait_until(lambda: word(off) == "ticking", PATIENCE, "the next beat ticks")
    assert stack.redis.client().exists("redbeat:report-free-space") == 0


def test_a_schedule_that_could_not_be_written_is_written_later(world: World) -> None:
    stack = world.stack(BEAT_SCHEDULE=SCHEDULE)
    stack.redis.ask("ACL", "SETUSER", "default", "resetkeys", "~redbeat:lock")
    beat = stack.beat().says("Redis refused a tick")

    stack.redis.ask("ACL", "SETUSER", "default", "~*")

    sends(stack, 2)
    assert word(beat) == "ticking"


def test_a_worker_with_beat_inside_sends_the_schedule_and_doubles_nobody(world: World) -> None:
    stack = world.stack(BEAT_SCHEDULE=SCHEDULE)
    # On a queue of its own, so that what beat sends stays where it can be counted.
    worker = stack.celery("worker --beat --queues=other --hostname=node0@%h --loglevel=info").ready()
    sends(stack)
    beat = stack.beat()
    world.wait_until(lambda: word(beat) == "standby", PATIENCE, "the second beat stands by")

    times = sends(stack, WATCHED)

    assert min(gaps(times)) > APART_SECONDS
    assert max(gaps(times)) < 1 + APART_SECONDS
    assert word(worker) == "ticking"


def test_the_one_that_stands_by_takes_over_when_the_holder_is_killed(succession: Succession) -> None:
    stack = succession.stack

    stack.world.wait_until(
        lambda: [at for at in sent(stack.redis) if at > succession.killed_at + 2],
        TAKEOVER_SECONDS,
        "the other beat sends",
    )

    times = sends(stack, 3)
    assert word(succession.heir) == "ticking"
    every = sent(stack.redis)
    assert max(gaps(every)) < TAKEOVER_SECONDS
    assert max(gaps(every)) > LOCK_SECONDS / 2
    assert min(gaps(every)) > APART_SECONDS
    assert min(gaps(times)) > APART_SECONDS
