"""The lease manager: one refused update keeps it from no other, and nothing ends it while there are leases."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from typing import Any

import pytest
import redis

from services.broker import keys, messages
from services.delivery import ack_buffer, lease_manager, registry, sweeper
from services.delivery.claim import ClaimedMessage
from services.delivery.connection import Connection
from services.delivery.lease_manager import LeaseManager
from services.delivery.leases import Leases
from services.delivery.unacked import UNKNOWN_TASK, Rules, UnackedDeliveries, clock
from tests.integration.delivery.commands import ENDS, claim, end_leases
from tests.support.redis.broker import Broker
from tests.support.waiting import TIMEOUT_SECONDS

pytestmark = pytest.mark.each_redis

# Renewed each second, and still there when a busy machine has stopped for two.
LEASE = 3
RULES = Rules(LEASE, max_deliveries=2, visibility_timeout=3600, priority_steps=keys.PRIORITY_STEPS)


class Claimer:
    """A process with a lease manager, what it has claimed, and the dead letters that it has reported."""

    def __init__(
        self,
        broker: Broker,
        on_dead_letters: Callable[[list[int]], None] | None = None,
        lease: int = LEASE,
        **options: Any,
    ) -> None:
        # Its connections do not retry by themselves, as those of kombu's pools.
        pool = redis.ConnectionPool(port=broker.server.port, socket_timeout=10, **options)
        self.wait_until, self.describe = broker.wait_until, broker.describe
        self.client: Any = redis.Redis(connection_pool=pool)
        self.deliveries = UnackedDeliveries(replace(RULES, lease=lease), Leases(self.client, lease))
        self.letters: list[int] = []
        self._numbers = count(1)
        self.manager = LeaseManager(self.deliveries, self.client, on_dead_letters or self.letters.extend)
        self.manager.start()

    def take(self, message: bytes = b"") -> ClaimedMessage:
        """Publish a message and claim it."""
        self.client.lpush("celery", message or b'{"body":%d}' % next(self._numbers))
        since = clock()
        found = claim(self.client, "celery", self.deliveries.rules.lease)
        self.deliveries.add([found.tag], 1, since)
        return found

    def close(self) -> None:
        """Requeue what is left, and end the lease manager."""
        self.deliveries.requeue_all()
        self.manager.close()

    def wait_renewed(self, one: ClaimedMessage) -> None:
        """Wait until the lease of `one` has been renewed twice."""
        ends = {self.client.zscore(keys.UNACKED_LEASES, one.tag)}

        def renewed() -> bool:
            ends.add(self.client.zscore(keys.UNACKED_LEASES, one.tag))
            return len(ends) > 2

        self.wait_until(renewed, "a lease is renewed, and again")

    def wait_started(self, *claimed: ClaimedMessage) -> None:
        """Wait until these are marked as started, and nothing else is."""
        tags = {one.tag.encode() for one in claimed}
        self.wait_until(lambda: self.client.smembers(keys.UNACKED_STARTED) == tags, "their starts are marked")


@pytest.fixture
def claimer(broker: Broker) -> Iterator[Claimer]:
    claimer = Claimer(broker)
    yield claimer
    claimer.client.config_set("maxmemory", 0)
    # So that Redis refuses nothing again.
    claimer.client.flushall()
    claimer.close()


@pytest.mark.parametrize("end", ["crash", "requeue later", "reject"])
def test_what_redis_refuses_is_sent_again_under_its_lease_and_holds_up_nothing(claimer: Claimer, end: str) -> None:
    # Its last delivery.
    one, refused = claimer.take(), claimer.take(message=b'{"delivery_count":2,"body":1}')
    for key in (keys.DEAD_LETTERS_NEXT, keys.SCHEDULED):
        claimer.client.set(key, "neither a number nor a sorted set")
    ENDS[end](claimer.deliveries, refused.tag)

    claimer.wait_renewed(refused)
    claimer.wait_renewed(one)
    acked = claimer.take()
    claimer.deliveries.ack(acked.tag)
    claimer.wait_until(lambda: not claimer.client.hexists(keys.UNACKED, acked.tag), "acknowledgements go on as well")
    assert claimer.client.hexists(keys.UNACKED, refused.tag), claimer.describe()

    claimer.client.delete(keys.DEAD_LETTERS_NEXT, keys.SCHEDULED)
    claimer.wait_until(lambda: not claimer.client.hexists(keys.UNACKED, refused.tag), "what was refused is sent again")
    if end != "requeue later":
        claimer.wait_until(lambda: claimer.letters, "it is reported")
        assert set(claimer.letters) == {1}


def test_a_full_redis_takes_renewals_acknowledgements_and_requeues(claimer: Claimer) -> None:
    acked, requeued = claimer.take(), claimer.take()
    claimer.client.config_set("maxmemory", 1)
    claimer.wait_renewed(acked)

    claimer.deliveries.ack(acked.tag)
    claimer.deliveries.requeue([requeued.tag])

    claimer.wait_until(lambda: claimer.client.lrange("celery", 0, -1) == [requeued.message], "one is requeued")
    claimer.wait_until(lambda: not claimer.client.exists(keys.UNACKED), "the other one is acknowledged")


def test_leases_are_renewed_when_redis_has_no_room_for_another_connection(claimer: Claimer) -> None:
    claimer.wait_renewed(claimer.take())
    # The lease manager and this test have one each, and get no more.
    pool = claimer.client.connection_pool
    for connection in [pool.get_connection() for _ in range(2)]:
        pool.release(connection)
    limit = claimer.client.config_get("maxclients")["maxclients"]
    claimer.client.config_set("maxclients", 1)
    try:
        claimer.client.client_kill_filter(_id=marking(claimer))
        claimer.wait_renewed(claimer.take())
    finally:
        claimer.client.config_set("maxclients", limit)


def marking(claimer: Claimer) -> str:
    """The id of the connection that marks started tasks: no other one gets so few commands."""

    def find() -> list[str]:
        with claimer.client.pipeline() as pipe:
            own, clients = pipe.client_id().client_list().execute()
        # Redis 6.2 shows a command without its subcommand, so that this test's own connection looks the same.
        commands = ("client|reply", "client", "sadd")
        return [one["id"] for one in clients if one["cmd"] in commands and one["id"] != str(own)]

    claimer.wait_until(find, "there is a connection for marks")
    return find()[0]


def test_a_start_is_marked_again_after_redis_has_closed_that_connection(claimer: Claimer) -> None:
    first, second = claimer.take(), claimer.take()
    claimer.deliveries.hand_to_pool(first.tag)
    claimer.deliveries.start(first.tag)
    claimer.client.client_kill_filter(_id=marking(claimer))
    # The lease manager looks at it when it has something else to do.
    claimer.deliveries.ack(claimer.take().tag)
    marking(claimer)
    claimer.deliveries.hand_to_pool(second.tag)
    claimer.deliveries.start(second.tag)
    claimer.wait_started(first, second)


def test_a_start_in_the_same_process_sends_the_acks_before_it(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    # Within this test, neither the buffer's time nor a renewal sends acknowledgements.
    monkeypatch.setattr(ack_buffer, "LONGEST_SECONDS", TIMEOUT_SECONDS * 100)
    claimer = Claimer(broker, lease=TIMEOUT_SECONDS * 100)
    # The last step of the lease manager's first turn, before which it has opened the connection for marks.
    claimer.wait_until(lambda: claimer.client.exists(keys.SWEEPS), "the lease manager has swept")
    ended, elsewhere, next_one = claimer.take(), claimer.take(), claimer.take()
    claimer.client.script_flush()
    for one in (ended, elsewhere):
        assert claimer.deliveries.start(one.tag)
        claimer.deliveries.ack(one.tag)

    assert claimer.deliveries.start(next_one.tag, here=True)

    claimer.wait_until(lambda: claimer.client.hkeys(keys.UNACKED) == [next_one.tag.encode()], "the others have ended")
    claimer.wait_started(next_one)
    assert not claimer.deliveries.is_idle, "it has been acknowledged for good"
    claimer.close()


def test_starts_are_marked_with_renewals_where_redis_refuses_silence(broker: Broker) -> None:
    broker.client.execute_command("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", "+@all", "-client")
    claimer = Claimer(broker, username="plain", password="word")
    one = claimer.take()
    claimer.deliveries.hand_to_pool(one.tag)
    claimer.deliveries.start(one.tag)
    claimer.wait_started(one)
    claimer.close()


def test_without_redis_a_task_starts_while_its_lease_is_fresh_and_not_when_that_is_almost_over() -> None:
    # Nobody listens on port 1.
    deliveries = UnackedDeliveries(RULES, Leases(redis.Redis(port=1), LEASE))
    # The reply to a claim may be long on its way: TCP repeats what a cut has swallowed after pauses that double.
    deliveries.add(["almost over"], 1, clock() - LEASE + 0.1)
    deliveries.add(["fresh"], 1, clock())

    # A command would fail.
    assert deliveries.start("fresh")
    assert not deliveries.start("almost over")
    assert not deliveries.holds("almost over")


def test_dead_letters_whose_report_fails_are_reported_again(broker: Broker) -> None:
    reports: list[list[int]] = []

    def report(letters: list[int]) -> None:
        reports.append(letters)
        raise OSError("the results are away")

    claimer = Claimer(broker, report)
    one, parked = claimer.take(), claimer.take()
    claimer.deliveries.reject(parked.tag, UNKNOWN_TASK, "")
    claimer.wait_until(lambda: len(reports) >= 3, "each sweep reports the dead letter again")
    assert {tuple(letters) for letters in reports} == {(1,)}
    claimer.wait_renewed(one)
    claimer.close()


def test_a_mark_that_came_too_late_is_swept_away(claimer: Claimer) -> None:
    """Marks and acknowledgements travel over two connections, and an acknowledgement may come first."""
    one = claimer.take()
    claimer.client.sadd(keys.UNACKED_STARTED, one.tag, *(f"late:{number}" for number in range(300)))
    claimer.wait_started(one)


def test_it_waits_without_haste_for_an_ack_that_is_under_way(claimer: Claimer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_manager, "CLOSE_SECONDS", 1.0)
    under_way: list[str] = []
    while not under_way:
        # The lease manager may be faster than the test.
        claimer.deliveries.ack(claimer.take().tag)
        under_way = claimer.deliveries.take_acks()

    cpu = time.process_time()
    claimer.manager.close()
    assert time.process_time() - cpu < 0.5, "the lease manager runs in circles"
    claimer.deliveries.rollback_acks(under_way)
    claimer.wait_until(lambda: claimer.deliveries.is_idle, "it is acknowledged in the end")


def test_a_simple_queue_works_again_after_its_lease_manager_was_closed(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test suites start one worker after the other; each closes the lease managers of its process at its end."""
    # Without those that other tests have left in this process, whose Redis is gone.
    monkeypatch.setattr(registry, "_entries", {})
    for _ in range(2):
        with Connection(broker.server.url(), transport_options={"lease": LEASE}) as connection:
            with connection.SimpleQueue("simple") as queue:
                for number in (1, 2):
                    queue.put({"n": number})
                assert queue.qsize() == 2
                for number in (1, 2):
                    message = queue.get(timeout=TIMEOUT_SECONDS)
                    assert message.payload == {"n": number}
                    message.ack()
                for get in (partial(queue.get, timeout=0.1), queue.get_nowait):
                    with pytest.raises(queue.Empty):
                        get()
            broker.nothing_is_left()
            assert registry.close()


def wait_swept(claimer: Claimer) -> None:
    """Leave a message as a process does that has died before it started its task; wait until it is requeued."""
    claimer.client.zadd(keys.UNACKED_LEASES, {"gone": 1})
    claimer.client.hset(keys.UNACKED, "gone", b'[{"body":"gone"},"","celery"]')
    swept = b'{"delivery_count":1,"body":"gone"}'
    claimer.wait_until(lambda: claimer.client.lrange("celery", 0, -1) == [swept], "it is swept")


def test_after_an_outage_no_lease_is_taken_before_all_could_be_renewed(claimer: Claimer) -> None:
    claimer.client.hset(keys.SWEEPS, mapping={"last": 0, "rest": 0})
    living = claimer.take()
    claimer.deliveries.requeue_claim("nothing", 0)
    wait_swept(claimer)
    rest, last = (float(claimer.client.hget(keys.SWEEPS, name) or 0) for name in ("rest", "last"))
    assert last >= rest > 0
    assert claimer.client.hexists(keys.UNACKED, living.tag)


def test_a_clock_that_was_ahead_and_is_put_back_stops_no_sweep_for_longer_than_a_lease(claimer: Claimer) -> None:
    ahead = claimer.client.time()[0] + 86400
    claimer.client.hset(keys.SWEEPS, mapping={"last": ahead, "rest": ahead})
    wait_swept(claimer)


def leave_started(client: Any, *texts: str) -> None:
    """Leave these messages as a worker does that has died while their tasks ran."""
    tags = [f"dead:{number}" for number in range(len(texts))]
    for tag, text in zip(tags, texts, strict=True):
        client.hset(keys.UNACKED, tag, f'[{text},"","celery"]')
        client.zadd(keys.UNACKED_LEASES, {tag: 0})
        client.sadd(keys.UNACKED_STARTED, tag)
    # Last: a sweep comes too late half a lease after it.
    end_leases(client, *tags)


def message(count: int, task: str, rest: str = "") -> str:
    return f'{{"delivery_count":{count},"headers":{{"id":"{task}"}}{rest}}}'


def sweep(client: Any, deliveries: int) -> tuple[list[str], dict[str, str], list[tuple[bytes, float]]]:
    """What a sweep requeues, what waits in which field, and until when."""
    # Half of this lease is longer than any machine takes to get here.
    sweeper.sweep(client, Rules(3600, deliveries, visibility_timeout=3600, priority_steps=keys.PRIORITY_STEPS))
    waiting = client.hgetall(keys.SCHEDULED_MESSAGES).items()
    return (
        [one.decode() for one in client.lrange("celery", 0, -1)],
        {field.decode(): messages.extract_message(record).decode() for field, record in waiting},
        client.zrange(keys.SCHEDULED, 0, -1, withscores=True),
    )


def test_tasks_that_died_together_start_one_after_the_other_for_the_last_two_times(broker: Broker) -> None:
    twice = message(4, "c"), message(4, "c", ',"again":1')
    leave_started(broker.client, message(3, "a"), message(3, "b"), *twice, message(5, "d"))

    requeued, waiting, dues = sweep(broker.client, deliveries=5)

    again = [message(4, "a"), message(4, "b"), message(5, "c"), message(5, "c", ',"again":1')]
    assert sorted([*requeued, *waiting.values()]) == sorted(again)
    assert len(requeued) == 1
    # So that they can be revoked by the ids of their tasks.
    names = {name.decode() for task in "abc" for name in keys.get_scheduled_fields(task)}
    assert waiting.keys() == {field.decode() for field, _ in dues} <= names
    moments = [due for _, due in dues]
    assert [later - sooner for sooner, later in pairwise(moments)] == [pytest.approx(10)] * 2
    assert broker.client.zcard(keys.DEAD_LETTERS) == 1


def test_a_task_that_dies_later_waits_behind_the_others_for_ten_minutes_at_most(broker: Broker) -> None:
    for task in "abc":
        leave_started(broker.client, message(1, task))
        requeued, waiting, dues = sweep(broker.client, deliveries=2)

    assert requeued == [message(2, "a")]
    assert list(waiting) == ["b", "c"]
    assert dues[1][1] - dues[0][1] == pytest.approx(10)

    leave_started(broker.client, *(message(1, f"{number}") for number in range(100)))
    _, waiting, dues = sweep(broker.client, deliveries=2)

    assert len(waiting) == 102
    assert dues[-1][1] <= broker.client.time()[0] + 601
