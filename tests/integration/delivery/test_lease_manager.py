"""The lease manager: one refused update keeps it from no other, and nothing ends it while there are leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
import redis

from services.broker import messages, scripts
from services.broker.keys import (
    DEAD_LETTERS,
    DEAD_LETTERS_NEXT,
    PRIORITY_STEPS,
    SCHEDULED,
    SCHEDULED_MESSAGES,
    SWEEPS,
    UNACKED,
    UNACKED_KEYS,
    UNACKED_LEASES,
    UNACKED_STARTED,
    get_lists,
    get_scheduled_fields,
)
from services.delivery import ack_buffer, lease_manager, registry, sweeper
from services.delivery.claim import Claim, ClaimedMessage, ClaimIds, claim_command, parse_reply
from services.delivery.connection import Connection
from services.delivery.lease_manager import LeaseManager
from services.delivery.leases import Leases
from services.delivery.unacked import UNKNOWN_TASK, Rules, UnackedDeliveries, clock
from tests.support.redis.server import RedisServer
from tests.support.waiting import wait_until
from tests.support.world import World

pytestmark = pytest.mark.each_redis

# A lease manager answers within milliseconds, and tries again after half a second.
PATIENCE = 120
# Renewed each second, and still there when a busy machine has stopped for two.
LEASE = 3
RULES = Rules(LEASE, max_deliveries=2, visibility_timeout=3600, priority_steps=PRIORITY_STEPS)


class Claimer:
    """What a process has claimed, with a lease manager, and the dead letters that this one has reported."""

    def __init__(
        self, client: Any, on_dead_letters: Callable[[list[int]], None] | None = None, lease: int = LEASE
    ) -> None:
        rules = replace(RULES, lease=lease)
        self.client, self.deliveries = client, UnackedDeliveries(rules, Leases(client, lease))
        self.letters: list[int] = []
        self._numbers, self._claims = count(1), ClaimIds()
        self.manager = LeaseManager(self.deliveries, client, on_dead_letters or self.letters.extend)
        self.manager.start()

    def take(self, queue: str = "celery", message: bytes = b"", ago: float = 0) -> ClaimedMessage:
        """Publish a message and claim it, with a question that was sent so many seconds ago."""
        self.client.lpush(queue, message or b'{"body":%d}' % next(self._numbers))
        asked = Claim(self._claims.next(), 1, (queue,), [], clock() - ago)
        [found] = parse_reply(
            asked, scripts.CLAIM(self.client, *claim_command(asked, get_lists(queue), self.deliveries.rules.lease))
        )
        self.deliveries.add([found.tag], 1, asked.since)
        return found

    def describe(self) -> str:
        """The state of the world, for somebody who asks why a test failed."""
        return "\n".join(
            [
                f"unacked: {self.client.hgetall(UNACKED)}",
                f"leases: {self.client.zrange(UNACKED_LEASES, 0, -1, withscores=True)}",
                f"celery: {self.client.lrange('celery', 0, -1)}",
                f"deliveries: {len(self.deliveries)}, idle: {self.deliveries.is_idle}",
                f"threads: {threading.enumerate()}",
            ]
        )

    def wait(self, condition: Callable[[], object], what: str) -> None:
        wait_until(condition, PATIENCE, what, self.describe)

    def renewals_go_on(self, one: ClaimedMessage) -> None:
        """Wait until the lease of `one` has been renewed twice."""
        ends = {self.client.zscore(UNACKED_LEASES, one.tag)}

        def renewed() -> bool:
            ends.add(self.client.zscore(UNACKED_LEASES, one.tag))
            return len(ends) > 2

        self.wait(renewed, "a lease is renewed, and again")


@pytest.fixture(scope="module")
def server(shared_world: World) -> RedisServer:
    return shared_world.redis("", lines=["appendonly no"])


def connect(server: RedisServer, **options: Any) -> Any:
    """A client whose connections try nothing again by themselves, as those of kombu's pools."""
    return redis.Redis(connection_pool=redis.ConnectionPool(port=server.port, socket_timeout=10, **options))


@pytest.fixture
def client(server: RedisServer) -> Any:
    found = connect(server)
    found.config_set("maxmemory", 0)
    found.flushall()
    return found


@pytest.fixture
def held(client: Any) -> Iterator[Claimer]:
    held = Claimer(client)
    yield held
    client.config_set("maxmemory", 0)
    # So that it finds nothing that Redis would refuse again.
    client.flushall()
    held.deliveries.requeue_all()
    held.manager.close()


def test_leases_are_renewed_while_redis_refuses_something_else(held: Claimer) -> None:
    one, refused = held.take(), held.take()
    # A dead letter cannot get a number.
    held.client.lpush(DEAD_LETTERS_NEXT, "not a number")
    held.deliveries.reject(refused.tag, UNKNOWN_TASK, "")

    held.renewals_go_on(one)
    acked = held.take()
    held.deliveries.ack(acked.tag)
    held.wait(lambda: not held.client.hexists(UNACKED, acked.tag), "acknowledgements go on as well")
    assert held.client.hexists(UNACKED, refused.tag), held.describe()

    held.client.delete(DEAD_LETTERS_NEXT)
    held.wait(lambda: held.letters, "what was refused is said again")
    assert set(held.letters) == {1}


@pytest.mark.parametrize("end", ["crash", "requeue", "reject"])
def test_what_has_ended_does_not_run_again_because_redis_refuses_to_hear_of_it(held: Claimer, end: str) -> None:
    # Its last delivery.
    refused = held.take(message=b'{"delivery_count":2,"body":1}')
    for key in (DEAD_LETTERS_NEXT, SCHEDULED):
        held.client.set(key, "neither a number nor a sorted set")
    endings: dict[str, Callable[[], None]] = {
        "crash": lambda: held.deliveries.record_crash(refused.tag, ""),
        "requeue": lambda: held.deliveries.requeue_later(refused.tag, "task"),
        "reject": lambda: held.deliveries.reject(refused.tag, UNKNOWN_TASK, ""),
    }
    endings[end]()

    held.renewals_go_on(refused)
    assert held.client.hget(UNACKED, refused.tag), held.describe()


def test_leases_are_renewed_when_redis_is_full(held: Claimer) -> None:
    one = held.take()
    held.client.config_set("maxmemory", 1)
    held.renewals_go_on(one)

    held.deliveries.ack(one.tag)
    held.wait(lambda: not held.client.hexists(UNACKED, one.tag), "a full Redis takes acknowledgements")


def test_what_is_given_back_to_a_full_redis_goes_back(held: Claimer) -> None:
    one = held.take()
    held.client.config_set("maxmemory", 1)
    held.deliveries.requeue([one.tag])
    held.wait(lambda: held.client.lrange("celery", 0, -1) == [one.message], "a full Redis takes it back")


def test_leases_are_renewed_when_redis_has_no_room_for_another_connection(held: Claimer) -> None:
    held.renewals_go_on(held.take())
    # The lease manager and this test have one each, and get no more.
    pool = held.client.connection_pool
    for connection in [pool.get_connection() for _ in range(2)]:
        pool.release(connection)
    limit = held.client.config_get("maxclients")["maxclients"]
    held.client.config_set("maxclients", 1)
    try:
        held.client.client_kill_filter(_id=marking(held))
        held.renewals_go_on(held.take())
    finally:
        held.client.config_set("maxclients", limit)


def marking(held: Claimer) -> str:
    """The id of the connection that marks started tasks; nothing else is so quiet."""
    held.wait(lambda: _marking(held), "there is a connection for marks")
    return _marking(held)[0]


def _marking(held: Claimer) -> list[str]:
    with held.client.pipeline() as pipe:
        asking, clients = pipe.client_id().client_list().execute()
    # Redis 6.2 tells a command without its form, so that of whoever asks is the same.
    return [
        one["id"] for one in clients if one["cmd"] in ("client|reply", "client", "sadd") and one["id"] != str(asking)
    ]


def test_a_start_is_marked_again_after_redis_has_closed_that_connection(held: Claimer) -> None:
    first, second = held.take(), held.take()
    held.deliveries.hand_to_pool(first.tag)
    held.deliveries.start(first.tag)
    held.client.client_kill_filter(_id=marking(held))
    # The lease manager looks at it when it has something else to do.
    held.deliveries.ack(held.take().tag)
    marking(held)
    held.deliveries.hand_to_pool(second.tag)
    held.deliveries.start(second.tag)
    both = {first.tag.encode(), second.tag.encode()}
    held.wait(lambda: held.client.smembers(UNACKED_STARTED) == both, "both are marked")


def test_a_start_in_the_same_process_acknowledges_what_has_ended_before(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What waits for company does so for longer than this test, and the lease manager takes it along with no renewal.
    monkeypatch.setattr(ack_buffer, "LONGEST_SECONDS", PATIENCE * 100)
    held = Claimer(client, lease=PATIENCE * 100)
    # The last step of its first turn, before which it has connected for marks.
    held.wait(lambda: client.exists(SWEEPS), "the lease manager has swept")
    ended, elsewhere, next_one = held.take(), held.take(), held.take()
    held.client.script_flush()
    for one in (ended, elsewhere):
        assert held.deliveries.start(one.tag)
        held.deliveries.ack(one.tag)

    assert held.deliveries.start(next_one.tag, here=True)

    held.wait(lambda: held.client.hkeys(UNACKED) == [next_one.tag.encode()], "the others are acknowledged")
    held.wait(lambda: held.client.smembers(UNACKED_STARTED) == {next_one.tag.encode()}, "the start is marked")
    assert not held.deliveries.is_idle, "it has been acknowledged for good"
    held.deliveries.requeue_all()
    held.manager.close()


def test_starts_are_marked_with_renewals_where_redis_refuses_silence(server: RedisServer, client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", "+@all", "-client")
    held = Claimer(connect(server, username="plain", password="word"))
    one = held.take()
    held.deliveries.hand_to_pool(one.tag)
    held.deliveries.start(one.tag)
    held.wait(lambda: held.client.smembers(UNACKED_STARTED) == {one.tag.encode()}, "its start is marked")
    held.deliveries.requeue_all()
    held.manager.close()


def test_a_task_id_that_utf8_cannot_spell_ends_nothing(held: Claimer) -> None:
    one, late = held.take(), held.take()
    held.deliveries.postpone(late.tag, time.time() + 3600, "half a pair: \ud800")
    held.wait(lambda: held.client.hkeys(SCHEDULED_MESSAGES) == [b"half a pair: \\ud800"], "it waits in Redis")
    held.renewals_go_on(one)


# The answer to a claim may be long on its way: what a cut has swallowed TCP sends again after pauses that double.
ALMOST = LEASE - 0.1


@pytest.fixture
def held_by_hand(held: Claimer) -> Claimer:
    """A claimer without a lease manager: only what is about to start is renewed."""
    held.manager.close()
    held.wait(lambda: not held.manager._thread.is_alive(), "the lease manager has ended")  # type: ignore[union-attr]
    return held


def test_a_lease_that_is_almost_over_is_renewed_before_its_task_starts(held_by_hand: Claimer) -> None:
    one = held_by_hand.take(ago=ALMOST)
    end = held_by_hand.client.zscore(UNACKED_LEASES, one.tag)

    assert held_by_hand.deliveries.hand_to_pool(one.tag)
    assert held_by_hand.client.zscore(UNACKED_LEASES, one.tag) > end, held_by_hand.describe()


def test_a_task_does_not_start_when_its_lease_is_almost_over_and_somebody_else_has_it(held_by_hand: Claimer) -> None:
    one = held_by_hand.take(ago=ALMOST)
    scripts.REQUEUE(held_by_hand.client, UNACKED_KEYS, [scripts.as_json(PRIORITY_STEPS), one.tag])

    assert not held_by_hand.deliveries.start(one.tag)
    assert held_by_hand.client.llen("celery") == 1, held_by_hand.describe()


def test_a_task_does_not_start_when_its_lease_is_almost_over_and_redis_is_away() -> None:
    # Nobody listens on port 1.
    deliveries = UnackedDeliveries(RULES, Leases(redis.Redis(port=1), LEASE))
    deliveries.add(["1"], 1, clock() - ALMOST)

    assert not deliveries.start("1")
    assert not deliveries.holds("1")


def test_nobody_asks_redis_before_a_task_starts_whose_lease_is_fresh() -> None:
    deliveries = UnackedDeliveries(RULES, Leases(redis.Redis(port=1), LEASE))
    deliveries.add(["1"], 1, clock())

    # With a question to a Redis that is not there it would not start.
    assert deliveries.start("1")


def test_a_listener_that_fails_ends_nothing_and_is_told_again(client: Any) -> None:
    told: list[list[int]] = []

    def listen(letters: list[int]) -> None:
        told.append(letters)
        raise OSError("the results are away")

    held = Claimer(client, listen)
    one, parked = held.take(), held.take()
    held.deliveries.reject(parked.tag, UNKNOWN_TASK, "")
    held.wait(lambda: len(told) >= 3, "each sweep tells of the dead letter again")
    assert {tuple(letters) for letters in told} == {(1,)}
    held.renewals_go_on(one)
    held.deliveries.requeue_all()
    held.manager.close()


def test_a_mark_that_came_too_late_is_swept_away(held: Claimer) -> None:
    """The mark of a start and the acknowledgement travel over two connections, and may overtake each other."""
    one = held.take()
    held.client.sadd(UNACKED_STARTED, one.tag, *(f"late:{number}" for number in range(300)))
    held.wait(lambda: held.client.smembers(UNACKED_STARTED) == {one.tag.encode()}, "only what is held is marked")


def test_the_lease_manager_waits_without_haste_for_an_acknowledgement_that_is_under_way(
    held: Claimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_manager, "CLOSE_SECONDS", 1.0)
    under_way: list[str] = []
    while not under_way:
        # The lease manager may be faster than the test.
        held.deliveries.ack(held.take().tag)
        under_way = held.deliveries.take_acks()

    cpu = time.process_time()
    held.manager.close()
    assert time.process_time() - cpu < 0.5, "the lease manager runs in circles"
    held.deliveries.rollback_acks(under_way)
    held.wait(lambda: held.deliveries.is_idle, "it is said after all")


def test_consuming_after_the_end_of_a_worker_in_the_same_process_is_kept_again(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test suites start one worker after the other; each of them closes the holders of its process at its end."""
    # Without what other tests have left in this process, whose Redis is gone.
    monkeypatch.setattr(registry, "_entries", {})
    client = connect(server)
    client.flushall()
    for body in ("first", "second"):
        with Connection(server.url(), transport_options={"lease": LEASE}) as connection:
            with connection.SimpleQueue("simple") as queue:
                queue.put(body)
                message = queue.get(timeout=PATIENCE)
                assert message.payload == body
                message.ack()
            wait_until(lambda: not client.hlen(UNACKED), PATIENCE, f"{body} is acknowledged")
            assert registry.close()


# A message that nobody has started and whose deliveries has died.
GONE = b'{"delivery_count":1,"body":"gone"}'


def test_nobody_sweeps_before_the_living_have_had_a_lease_to_renew(held: Claimer) -> None:
    held.client.hset(SWEEPS, mapping={"last": 0, "rest": 0})
    dead = held.take()
    held.deliveries.requeue_claim("nothing", 0)
    held.client.zadd(UNACKED_LEASES, {"gone": 1})
    held.client.hset(UNACKED, "gone", b'[{"body":"gone"},"","celery"]')
    held.wait(lambda: held.client.lrange("celery", 0, -1) == [GONE], "it is swept in the end")
    rest, last = (float(held.client.hget(SWEEPS, name) or 0) for name in ("rest", "last"))
    assert last >= rest > 0
    assert held.client.hexists(UNACKED, dead.tag)


def test_a_clock_that_was_ahead_and_is_put_back_stops_no_sweep_for_longer_than_a_lease(held: Claimer) -> None:
    ahead = held.client.time()[0] + 86400
    held.client.hset(SWEEPS, mapping={"last": ahead, "rest": ahead})
    held.client.zadd(UNACKED_LEASES, {"gone": 1})
    held.client.hset(UNACKED, "gone", b'[{"body":"gone"},"","celery"]')
    held.wait(lambda: held.client.lrange("celery", 0, -1) == [GONE], "it is swept")


def died_with(client: Any, *texts: str) -> None:
    """These messages had been started by a worker that is dead."""
    for number, text in enumerate(texts):
        client.hset(UNACKED, f"dead:{number}", f'[{text},"","celery"]')
        client.zadd(UNACKED_LEASES, {f"dead:{number}": number + 1})
        client.sadd(UNACKED_STARTED, f"dead:{number}")
    # Last: a sweep comes too late half a lease after it.
    seconds, microseconds = client.time()
    client.hset(SWEEPS, mapping={"last": seconds + microseconds / 1e6, "rest": 0})


def message(count: int, task: str, rest: str = "") -> str:
    return f'{{"delivery_count":{count},"headers":{{"id":"{task}"}}{rest}}}'


def sweep(client: Any, deliveries: int) -> tuple[list[str], dict[str, str], list[tuple[bytes, float]]]:
    """What a sweep brings back to its list, what waits in which field, and until when."""
    # Half of this lease is longer than any machine takes to get here.
    sweeper.sweep(client, Rules(3600, deliveries, visibility_timeout=3600, priority_steps=PRIORITY_STEPS))
    waiting = client.hgetall(SCHEDULED_MESSAGES).items()
    return (
        [one.decode() for one in client.lrange("celery", 0, -1)],
        {field.decode(): messages.extract_message(record).decode() for field, record in waiting},
        client.zrange(SCHEDULED, 0, -1, withscores=True),
    )


def test_what_died_together_starts_again_together_while_it_has_starts_enough(client: Any) -> None:
    died_with(client, message(1, "a"), message(2, "b"))

    back, waiting, _ = sweep(client, deliveries=5)

    assert back == [message(3, "b"), message(2, "a")]
    assert not waiting


def test_what_died_together_starts_for_the_last_two_times_one_after_the_other(client: Any) -> None:
    died_with(client, message(3, "a"), message(3, "b"), message(4, "c"), message(4, "c", ',"again":1'), message(5, "d"))

    back, waiting, dues = sweep(client, deliveries=5)

    again = [message(4, "a"), message(4, "b"), message(5, "c"), message(5, "c", ',"again":1')]
    assert sorted([*back, *waiting.values()]) == sorted(again)
    assert len(back) == 1
    # So that they can be revoked by the ids of their tasks.
    names = {name.decode() for task in "abc" for name in get_scheduled_fields(task)}
    assert waiting.keys() == {field.decode() for field, _ in dues} <= names
    moments = [due for _, due in dues]
    assert [later - sooner for sooner, later in pairwise(moments)] == [pytest.approx(10)] * 2
    assert client.zcard(DEAD_LETTERS) == 1


def test_what_dies_next_waits_for_those_whose_turn_comes_before(client: Any) -> None:
    for task in "abc":
        died_with(client, message(1, task))
        back, waiting, dues = sweep(client, deliveries=2)

    assert back == [message(2, "a")]
    assert list(waiting) == ["b", "c"]
    assert dues[1][1] - dues[0][1] == pytest.approx(10)


def test_nobody_waits_longer_than_ten_minutes_for_a_turn(client: Any) -> None:
    died_with(client, *(message(1, f"{number}") for number in range(100)))

    back, waiting, dues = sweep(client, deliveries=2)

    assert (len(back), len(waiting)) == (1, 99)
    assert dues[-1][1] <= client.time()[0] + 601
