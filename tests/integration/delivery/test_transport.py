"""The transport as kombu knows it, without Celery: connections, channels, consumers, and what goes wrong with them."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from uuid import uuid4

import pytest
import redis
from kombu import Exchange, Producer, Queue
from kombu.asynchronous import Hub
from kombu.exceptions import InconsistencyError

from config import load
from config.celery import build_celery_configuration
from services.broker import keys, scripts
from services.broker.outages import Outage
from services.control.mailbox import Mailbox
from services.delivery import claim, sweeper
from services.delivery.channel import Channel
from services.delivery.connection import Connection
from tests.integration.delivery.commands import end_leases, replay_letters
from tests.support.harness import Harness
from tests.support.redis.broker import LEASE, QUIET, Broker, Inbox, Listener
from tests.support.redis.proxy import Proxy, has_word
from tests.support.redis.server import RedisServer
from tests.support.redis.urls import FORMS, start_server
from tests.support.waiting import TIMEOUT_SECONDS, holds_for, wait_until

pytestmark = pytest.mark.each_redis


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let consumers look by themselves only after a test's time: until then only notifications wake them."""
    monkeypatch.setattr(claim, "LOOK_SECONDS", TIMEOUT_SECONDS * 100)


@pytest.fixture
def outage_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What consumers log of a Redis that gives them nothing."""
    lines: list[str] = []
    monkeypatch.setattr(Channel, "outage", Outage("consumer", lines.append))
    return lines


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


# --- Consuming


def test_a_channel_holds_no_more_than_its_prefetch_count(broker: Broker) -> None:
    connection = broker.connect()
    for queue in ("one", "two"):
        broker.send(queue, *range(10))
    first = Inbox(connection.channel(), "one", prefetch=3, ack=False)
    second = Inbox(connection.channel(), "two", prefetch=5, ack=False)
    first.drain(3, broker)
    second.drain(5, broker)
    second.stays_at(5)
    assert (len(first.messages), broker.count_unacked()) == (3, 8)
    assert [broker.client.llen(name) for name in ("one", "two")] == [7, 5]

    first.messages[0].ack()
    first.drain(4, broker)
    first.stays_at(4)
    assert len(second.messages) == 5


def test_consumers_of_a_channel_get_the_most_urgent_first_and_their_queues_in_turn(broker: Broker) -> None:
    channel = broker.connect().channel()
    for priority in (9, 5, 0):
        for queue in ("one", "two"):
            broker.send(queue, *(f"{priority} {queue} {number}" for number in range(3)), priority=priority)
    broker.send("three", *range(5))
    other, inbox = Inbox(channel, "three"), Inbox(channel, "one", "two", prefetch=4)
    bodies = inbox.drain(18, broker)
    assert other.drain(5, broker) == list(range(5))
    broker.nothing_is_left()
    assert [body[0] for body in bodies] == ["0"] * 6 + ["5"] * 6 + ["9"] * 6
    for urgency in "059":
        for name in ("one", "two"):
            of = [body for body in bodies if body.startswith(f"{urgency} {name}")]
            assert of == [f"{urgency} {name} {number}" for number in range(3)]
        turns = [body.split()[1] for body in bodies if body[0] == urgency]
        assert {*turns[:2]} == {*turns[2:4]} == {*turns[4:]} == {"one", "two"}, turns


def test_recover_requeues_what_is_not_acknowledged(broker: Broker) -> None:
    channel = broker.connect().channel()
    inbox = Inbox(channel, "one", prefetch=3, ack=False)
    broker.send("one", *"abcd")
    inbox.drain(3, broker)
    inbox.messages[0].ack()
    inbox.consumer.recover(requeue=True)
    assert sorted(inbox.drain(6, broker)) == sorted("abcbcd")
    assert broker.count_unacked() == 3


def test_closing_requeues_in_its_old_order_what_was_claimed_and_what_is_being_claimed(broker: Broker) -> None:
    connection = broker.connect()
    inbox = Inbox(connection.channel(), "one", prefetch=4, ack=False)
    Inbox(connection.channel(), "two", ack=False).stays_at(0, 0.2)
    broker.send("one", *"abcdef")
    inbox.drain(2, broker)
    inbox.messages[0].ack()
    # The reply to this claim comes when nobody reads it any more.
    broker.send("two", *"abc")
    connection.transport.cycle.on_poll_start()
    connection.close()
    broker.nothing_is_left()
    assert [broker.waiting(name) for name in ("one", "two")] == [[*"bcdef"], [*"abc"]]
    # Nothing expires in a queue that does not.
    assert (broker.client.pttl("one"), broker.client.exists(f"{keys.EXPIRES}one")) == (-1, 0)


def test_a_connection_that_is_closed_leaves_its_event_loop(broker: Broker) -> None:
    hub = Hub()
    connection = broker.connect()
    Inbox(connection.channel(), "one")
    before = set(hub.readers)
    connection.transport.register_with_event_loop(connection.connection, hub)
    for tick in list(hub.on_tick):
        tick()
    fd = connection.transport.cycle._wake_up_fd
    assert fd in hub.readers
    # A child that is forked has one as well, and as long as that is open the loop would go on hearing it.
    copy = os.dup(fd)
    connection.close()
    assert (set(hub.readers), hub.on_tick) == (before, set())
    os.eventfd_write(copy, 1)
    assert fd not in [number for number, _ in hub.poller.poll(0) or []]
    os.close(copy)
    hub.close()


def test_basic_get_claims_one_message(broker: Broker) -> None:
    channel = broker.connect().channel()
    assert channel.basic_get("one") is None
    broker.send("one", "urgent", priority=0)
    broker.send("one", "later", priority=9)
    message = channel.basic_get("one")
    assert (message.payload, broker.count_unacked()) == ("urgent", 1)
    message.ack()
    channel.basic_get("one").requeue()
    broker.nothing_is_left()
    assert channel.basic_get("one", no_ack=True).payload == "later"
    broker.nothing_is_left()
    assert channel.basic_get("one") is None


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_message_for_a_cancelled_consumer_stays_in_its_queue(broker: Broker, no_ack: bool) -> None:
    channel = broker.connect().channel()
    cancelled, other = (Inbox(channel, name, no_ack=no_ack, ack=False) for name in ("one", "two"))
    # A claim for both queues is under way when one of them is cancelled.
    other.stays_at(0, 0.1)
    cancelled.consumer.cancel()
    broker.send("one", "a")
    broker.send("two", "b")
    assert other.drain(1, broker) == ["b"]
    broker.wait_until(lambda: broker.waiting("one") == ["a"], "it is in its queue")
    assert cancelled.messages == []


def test_a_queue_without_acknowledgements_outlives_a_connection_that_fell_silent(broker: Broker, proxy: Proxy) -> None:
    # It has to be found silent within the time of this test.
    connection = broker.connect(f"redis://127.0.0.1:{proxy.port}/0", health_check_interval=1)
    inbox = Inbox(connection.channel(), "one", no_ack=True, ack=False)
    inbox.stays_at(0, 0.1)
    proxy.half_open()
    broker.send("one", "a", "b")
    # One of them at most is lost with the answer that has it: nobody has to acknowledge it.
    inbox.drain(1, broker)


@pytest.mark.usefixtures("no_looks")
def test_an_acknowledgement_in_another_thread_makes_room_at_once(broker: Broker) -> None:
    """Two connections of one process share its deliveries, and each has to hear that it has credit again."""
    inboxes = [Inbox(broker.connect().channel(), name, prefetch=1, ack=False) for name in ("one", "two")]
    broker.send("one", "a", "b")
    broker.send("two", "a", "b")
    for inbox in inboxes:
        inbox.drain(1, broker)

    with draining(*inboxes, timeout=None, enough=2):
        holds_for(lambda: all(len(inbox.messages) == 1 for inbox in inboxes), 0.2, "both wait", broker.describe)
        for inbox in inboxes:
            inbox.messages[0].ack()
        broker.wait_until(lambda: all(len(inbox.messages) == 2 for inbox in inboxes), "both get their second message")


@contextmanager
def draining(*inboxes: Inbox, timeout: float | None = 0.5, enough: int = sys.maxsize) -> Iterator[None]:
    """Drain each of these in a thread of its own, which ends with so many messages, or when `timeout` has passed."""
    ended = threading.Event()

    def drain(inbox: Inbox) -> None:
        while not ended.is_set() and len(inbox.messages) < enough:
            with suppress(socket.timeout):
                inbox.channel.connection.client.drain_events(timeout=timeout)

    threads = [threading.Thread(target=drain, args=(inbox,), daemon=True) for inbox in inboxes]
    for thread in threads:
        thread.start()
    yield
    ended.set()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_a_message_that_another_process_took_while_this_one_stood_still_is_not_delivered(broker: Broker) -> None:
    inbox = Inbox(broker.connect().channel(), "one", prefetch=3)
    broker.send("one", *range(3))
    inbox.drain(1, broker)
    deliveries = inbox.channel.deliveries
    assert len(deliveries) == 2
    for delivery in deliveries._deliveries.values():
        delivery.until = 0.0
    sweep(broker, inbox)

    assert sorted(inbox.drain(3, broker)) == [0, 1, 2]
    inbox.stays_at(3, 0.2)
    broker.nothing_is_left()


def sweep(broker: Broker, inbox: Inbox) -> None:
    """Sweep what this consumer has claimed, as if its process were dead."""
    deliveries = inbox.channel.deliveries
    end_leases(broker.client, *deliveries._deliveries)
    assert sweeper.sweep(broker.client, deliveries.rules).requeued == len(deliveries)


# --- Queues that expire


# Long enough for the slowest test.
EXPIRES = 600


def consume_expiring(broker: Broker, consumed: bool = True) -> Inbox:
    """A consumer of a queue that expires, which has claimed a message. `consumed`: it has declared the queue."""
    channel = broker.connect().channel()
    Producer(channel).publish("a", routing_key="fleeting", declare=[Queue("fleeting", expires=EXPIRES)])
    inbox = Inbox(channel if consumed else broker.connect().channel(), "fleeting", ack=False)
    inbox.drain(1, broker)
    assert not broker.client.exists("fleeting")
    return inbox


def postpone(broker: Broker, inbox: Inbox) -> None:
    """Let its message be due later, which is soon."""
    inbox.channel.deliveries.postpone(inbox.messages[0].delivery_tag, time.time() + 0.01, "some-id")


def replay(broker: Broker, inbox: Inbox) -> None:
    """Make a dead letter of its message, and replay it."""
    inbox.messages[0].reject()
    broker.wait_until(lambda: broker.client.zcard(keys.DEAD_LETTERS) == 1, "it is parked")
    assert replay_letters(broker.client, 1) == [1]


def requeue_stock(broker: Broker, inbox: Inbox) -> None:
    """Requeue its message as that of a dead stock consumer."""
    [tag] = inbox.channel.deliveries._deliveries
    record = broker.client.hget(keys.UNACKED, tag)
    assert scripts.REQUEUE_STOCK(broker.client, keys.UNACKED_KEYS, [tag, record, "fleeting", "a"]) == 1


WAYS_BACK: dict[str, Callable[[Broker, Inbox], object]] = {
    "requeued": lambda _, inbox: inbox.messages[0].requeue(),
    "closed": lambda _, inbox: inbox.channel.connection.client.close(),
    "crashed": lambda _, inbox: inbox.channel.deliveries.record_crash(inbox.messages[0].delivery_tag, "it died"),
    "swept": sweep,
    "due": postpone,
    "replayed": replay,
    "of a stock consumer": requeue_stock,
}


@pytest.mark.parametrize("consumed", [True, False], ids=["declared by its consumer", "declared by its producer"])
@pytest.mark.parametrize("way", WAYS_BACK)
def test_a_queue_that_expires_does_so_with_what_comes_back_to_it(broker: Broker, way: str, consumed: bool) -> None:
    inbox = consume_expiring(broker, consumed)
    WAYS_BACK[way](broker, inbox)
    broker.wait_until(lambda: broker.client.exists("fleeting"), "it is requeued")
    assert 0 < broker.client.pttl("fleeting") <= EXPIRES * 1000, broker.describe()


def test_a_reply_to_a_client_that_is_gone_expires(broker: Broker) -> None:
    channel = broker.connect().channel()
    queue = Queue("answers", Exchange("reply.everybody.pidbox", "direct"), routing_key="answers", expires=EXPIRES)
    Producer(channel).publish("a", exchange=queue.exchange, routing_key="answers", declare=[queue])
    answer = channel._get("answers")
    assert not broker.client.exists("answers")
    channel.connection._reject_inbound_message(answer)
    assert 0 < broker.client.pttl("answers") <= EXPIRES * 1000, broker.describe()


def test_a_queue_that_expires_no_more_keeps_what_comes_back_to_it(broker: Broker) -> None:
    consume_expiring(broker).channel.connection.client.close()
    broker.wait_until(lambda: broker.client.exists("fleeting"), "it is requeued")
    broker.client.delete("fleeting")
    assert broker.client.exists(f"{keys.EXPIRES}fleeting")

    inbox = Inbox(broker.connect().channel(), "fleeting", prefetch=1, ack=False)
    broker.send("fleeting", "b")
    inbox.drain(1, broker)
    inbox.channel.connection.client.close()

    broker.wait_until(lambda: broker.client.exists("fleeting"), "it is requeued")
    assert broker.client.pttl("fleeting") == -1, broker.describe()


def test_a_consumer_that_is_busy_keeps_what_waits_in_its_queue_that_expires(broker: Broker) -> None:
    channel = broker.connect().channel()
    producer = Producer(channel)
    for body in "ab":
        producer.publish(body, routing_key="fleeting", declare=[Queue("fleeting", expires=EXPIRES)])
    inbox = Inbox(channel, "fleeting", prefetch=1, ack=False)
    inbox.drain(1, broker)
    broker.client.pexpire("fleeting", 1000 * EXPIRES // 2)
    # As if a third of its time were over.
    channel._keep_queues_at = 0.0
    inbox.stays_at(1, 0.1)
    assert broker.client.pttl("fleeting") > 1000 * EXPIRES // 2, broker.describe()


# --- Publishing


def test_a_publish_whose_answer_is_lost_is_enqueued_once(broker: Broker, proxy: Proxy) -> None:
    connection = broker.connect(f"redis://127.0.0.1:{proxy.port}/0")
    producer = Producer(connection.channel())
    for number in range(5):
        trap = proxy.drop_reply(has_word(b"published:"))
        producer.publish(number, routing_key="one", retry=True, retry_policy={"max_retries": 3, "interval_start": 0})
        trap.wait()
    assert broker.waiting("one") == list(range(5))


@pytest.mark.parametrize("exchange", ["", "ours"])
def test_a_publish_that_is_cut_off_as_its_queue_is_declared_comes_once(
    broker: Broker, proxy: Proxy, exchange: str
) -> None:
    connection = broker.connect(f"redis://127.0.0.1:{proxy.port}/0")
    queue = Queue("one", Exchange("ours", "direct"), routing_key="one")
    trap = proxy.drop_reply(has_word(b"_kombu.binding.ours"))
    # kombu declares it over a new connection, and publishes on the old one's channel.
    Producer(connection).publish(
        "a", exchange=exchange, routing_key="one", declare=[queue], retry=True, retry_policy={"max_retries": 3}
    )
    trap.wait()
    assert broker.waiting("one") == ["a"]


def test_a_command_whose_connection_is_cut_is_sent_again(broker: Broker, proxy: Proxy) -> None:
    connection = broker.connect(f"redis://127.0.0.1:{proxy.port}/0")
    trap = proxy.drop_reply(has_word(b"/0.everybody.pidbox"))
    assert Mailbox("everybody", "fanout", connection)._broadcast("ping", reply=True, timeout=TIMEOUT_SECONDS) == []
    trap.wait()


def test_a_message_that_is_sent_on_with_its_own_properties_is_another_message(broker: Broker) -> None:
    connection = broker.connect()
    inbox = Inbox(connection.channel(), "one")
    producer = Producer(connection.channel())
    producer.publish("a", routing_key="one")
    inbox.drain(1, broker)
    for _ in range(2):
        message = inbox.messages[0]
        producer.publish(message.payload, routing_key="one", headers=message.headers, **message.properties)
    assert inbox.drain(3, broker) == ["a"] * 3
    inbox.stays_at(3, 0.2)


def test_a_publish_reaches_every_queue_that_is_bound_and_fails_where_none_is(broker: Broker) -> None:
    channel = broker.connect().channel()
    with pytest.raises(InconsistencyError):
        Producer(channel).publish("a", exchange="nowhere", routing_key="key")
    assert not broker.client.keys("*")

    exchange = Exchange("ours", "direct")
    for name in ("one", "two"):
        Queue(name, exchange, routing_key="key")(channel).declare()
    Producer(channel).publish("a", exchange=exchange, routing_key="key")
    assert [broker.waiting(name) for name in ("one", "two")] == [["a"], ["a"]]


# --- Waiting


def test_a_channel_that_has_received_replies_claims_at_once(broker: Broker) -> None:
    """A node asks the others when it starts; kombu would first wait for more of their replies."""
    channel = broker.connect().channel()
    channel.brpop_timeout = TIMEOUT_SECONDS * 100
    answers = Inbox(channel, f"{uuid4()}.reply.celery.pidbox")
    answers.stays_at(0, 0.2)
    answers.consumer.cancel()

    tasks = Inbox(channel, "one")

    broker.send("one", "first")
    assert tasks.drain(1, broker) == ["first"]


@pytest.mark.usefixtures("no_looks")
def test_an_idle_consumer_sends_nothing_and_a_message_wakes_it_whatever_its_queue_and_priority(broker: Broker) -> None:
    queues = [f"queue{number}" for number in range(5)]
    listener = Listener(broker.connect(), *queues)
    producer = Producer(broker.connect().channel())
    sent = [f"{queue} {priority}" for queue in queues[:3] for priority in keys.PRIORITY_STEPS]
    with listener.running():
        broker.wait_idle(1)
        before = broker.commands()
        # For what must not happen.
        time.sleep(QUIET)
        commands = broker.commands() - before
        assert set(commands) == {"info"}, commands
        for number, body in enumerate(sent):
            broker.wait_idle(1)
            queue, priority = body.split()
            producer.publish(body, routing_key=queue, priority=int(priority))
            broker.wait_until(lambda: len(listener.bodies) > number, f"{body} arrives")  # noqa: B023
    assert listener.bodies == sent


@pytest.mark.usefixtures("no_looks")
def test_idle_consumers_are_woken_once_for_a_message(broker: Broker) -> None:
    consumers, messages = 20, 10
    inboxes = [Inbox(broker.connect().channel(), "one", prefetch=1) for _ in range(consumers)]
    producer = Producer(broker.connect().channel())
    with draining(*inboxes):
        broker.wait_idle(consumers)
        before = broker.commands()
        for number in range(messages):
            producer.publish("a", routing_key="one")
            broker.wait_until(lambda: sum(len(inbox.messages) for inbox in inboxes) > number, "it arrives")  # noqa: B023
            broker.wait_idle(consumers)
        sent = broker.commands() - before
    # Each message changes its list when it comes and when it is taken; a consumer that looked in between looks again.
    assert sent["exists"] <= 2 * messages * (consumers + 1), sent


def test_a_busy_consumer_keeps_its_connection(broker: Broker) -> None:
    inbox = Inbox(broker.connect().channel(), "one", prefetch=1, ack=False)
    broker.send("one", "a")
    inbox.drain(1, broker)
    before = inbox.channel.client.connection._sock
    for _ in range(3):
        broker.send("one", "b")
        inbox.stays_at(1, 0.2)
    assert inbox.channel.client.connection._sock is before
    inbox.messages[0].ack()
    inbox.drain(2, broker)


# --- Faults


def close_waiting_connection(broker: Broker, _: Proxy) -> None:
    broker.wait_until(lambda: tracked(broker), "it waits")
    for client in tracked(broker):
        broker.client.client_kill_filter(_id=client)


def drop_reply(word: bytes) -> Callable[[Broker, Proxy], Callable[[], None]]:
    return lambda _, proxy: proxy.drop_reply(has_word(word)).wait


FAULTS: dict[str, Callable[[Broker, Proxy], Callable[[], None] | None]] = {
    "its waiting connection is closed": close_waiting_connection,
    "the answer to its claim is lost": drop_reply(b"EVALSHA"),
    "the answer to its look is lost": drop_reply(b"EXISTS"),
    "Redis has forgotten all scripts": lambda broker, _: broker.client.script_flush() and None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_consuming_goes_on_and_loses_nothing_when(broker: Broker, proxy: Proxy, fault: str) -> None:
    listener = Listener(broker.connect(f"redis://127.0.0.1:{proxy.port}/0"), "one")
    with listener.running():
        for number in range(5):
            wait_happened = FAULTS[fault](broker, proxy)
            broker.send("one", number)
            if wait_happened:
                wait_happened()
            broker.wait_until(lambda: number in listener.bodies, "it arrives")  # noqa: B023
    broker.nothing_is_left()
    assert listener.bodies == list(range(5))


def tracked(broker: Broker) -> list[str]:
    """The ids of the connections that wait for messages: Redis tracks what they have looked at."""
    return [one["id"] for one in broker.clients() if "t" in one["flags"]]


def test_the_first_start_over_a_new_connection_is_marked(broker: Broker) -> None:
    """The start of a task that kills its node at once counts, even if it is the first that the node has claimed."""
    # No other test has this lease, so that it has a lease manager of its own, which is made when it consumes.
    channel = broker.connect(lease=LEASE + 1).channel()
    deliveries, inbox, tags = channel.deliveries, None, set()
    for number in (1, 2):
        broker.send("one", number)
        # The thread of the lease manager needs this for each of its turns, in which it repeats marks.
        with deliveries.changed:
            inbox = inbox or Inbox(channel, "one", ack=False)
            inbox.drain(number, broker)
            tag = inbox.messages[-1].delivery_tag
            assert deliveries.hand_to_pool(tag)
            assert deliveries.start(tag)
            tags.add(tag.encode())
            broker.wait_until(lambda: broker.client.smembers(keys.UNACKED_STARTED) == tags, "its start is marked")
        broker.wait_until(lambda: broker.client.exists(keys.SWEEPS), "leases were swept")
        broker.client.client_kill_filter(_type="normal", skipme=True)
    deliveries.requeue_all()
    broker.nothing_is_left()


def test_a_full_redis_loses_nothing_and_consuming_goes_on_when_there_is_room(broker: Broker) -> None:
    broker.send("one", *range(10))
    listener = Listener(broker.connect(), "one", pause=0.02)
    with listener.running():
        broker.wait_until(lambda: len(listener.bodies) >= 2, "some arrive")
        broker.client.config_set("maxmemory", 1)
        # Redis 6.2 gives a script's refusal no type of its own.
        with pytest.raises(redis.exceptions.ResponseError, match="command not allowed when used memory"):
            broker.send("one", "refused")
        known = len(listener.bodies)
        holds_for(lambda: len(listener.bodies) <= known + 2, QUIET, "nothing is claimed", broker.describe)
        broker.client.config_set("maxmemory", 0)
        broker.wait_until(lambda: len(listener.bodies) == 10, "the rest arrives")
    broker.nothing_is_left()
    assert listener.bodies == list(range(10))


def test_a_consumer_waits_for_a_redis_that_lets_it_claim_nothing(broker: Broker, outage_log: list[str]) -> None:
    broker.send("one", "a")
    broker.server.ask("ACL", "SETUSER", "default", "-evalsha")
    try:
        inbox = Inbox(broker.connect().channel(), "one")
        inbox.stays_at(0, QUIET)
    finally:
        broker.server.ask("ACL", "SETUSER", "default", "+evalsha")
    assert inbox.drain(1, broker) == ["a"]
    assert "NOPERM" in outage_log[0]
    assert "goes on" in outage_log[1]
    assert len(outage_log) == 2


def test_a_consumer_that_finds_nothing_in_a_full_redis_waits_no_longer(broker: Broker, outage_log: list[str]) -> None:
    broker.send("one", "a")
    broker.client.config_set("maxmemory", 1)
    inbox = Inbox(broker.connect().channel(), "one")

    def wait_logged(lines: int) -> None:
        def logged() -> bool:
            inbox.stays_at(0, 0.05)
            return len(outage_log) >= lines

        wait_until(logged, TIMEOUT_SECONDS, f"{lines} lines", lambda: f"{outage_log}")

    wait_logged(1)
    # As if another consumer had taken it.
    broker.client.delete("one")
    wait_logged(2)
    where = f"Redis at 127.0.0.1:{broker.server.port}/0"
    assert outage_log[0].startswith(f"consumer: waiting for {where} to give tasks: ")
    assert "OOM command not allowed" in outage_log[0]
    assert outage_log[1].endswith(f" s of waiting for {where}")


def test_a_consumer_without_a_timeout_goes_on_when_a_full_redis_has_room_again(broker: Broker) -> None:
    broker.send("one", "a")
    broker.client.config_set("maxmemory", 1)
    inbox = Inbox(broker.connect().channel(), "one")
    with draining(inbox, timeout=None, enough=1):
        holds_for(lambda: not inbox.messages, 0.5, "nothing is claimed", broker.describe)
        broker.client.config_set("maxmemory", 0)
        broker.wait_until(lambda: inbox.messages, "it arrives")


@pytest.mark.parametrize("timeout", [0.5, None], ids=["with a timeout", "without end"])
def test_a_redis_that_refuses_tracking_is_asked_now_and_then(broker: Broker, timeout: float | None) -> None:
    # Redis 6.2 can take away a command only with all of its forms.
    allowed = ("+@all", "-client", "+client|reply")
    broker.client.execute_command("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", *allowed)
    inbox = Inbox(broker.connect(broker.server.url(0, "word", "plain")).channel(), "one")
    with draining(inbox, timeout=timeout, enough=4):
        for number in range(3):
            broker.send("one", number)
            broker.wait_until(lambda: len(inbox.messages) == number + 1, "it arrives")  # noqa: B023
        before, began = broker.commands(), time.monotonic()
        # For what must not happen.
        time.sleep(QUIET)
        asked, seconds = (broker.commands() - before)["evalsha"], time.monotonic() - began
        # So that the thread has enough.
        broker.send("one", "the last")
    # A second look, of the lease manager, and one that was under way.
    assert asked <= 2 * seconds / claim.LOOK_UNTRACKED_SECONDS + 2, "it asks without rest"


def test_a_forked_process_claims_under_names_of_its_own(broker: Broker) -> None:
    """The same name twice would write one message over the other."""
    channel = broker.connect().channel()
    with get_context("fork").Pool(1) as pool:
        theirs = pool.apply(channel._claim_ids.next)
    assert theirs
    assert theirs != channel._claim_ids.next()


# --- Every form of URL


@pytest.mark.parametrize("form", FORMS)
def test_messages_travel_with_every_form_of_url(harness: Harness, form: str) -> None:
    server, variables = start_server(harness, form)
    settings = build_celery_configuration(load(variables))
    name = uuid4().hex
    with Connection(settings["broker_url"], transport_options=settings["broker_transport_options"]) as connection:
        assert type(connection.transport).__module__ == "services.delivery.transport"
        producer, inbox = Producer(connection.channel()), Inbox(connection.channel(), name, prefetch=2)
        for number in range(5):
            producer.publish(number, routing_key=name)
        broker = Broker(server)
        broker.client = server.client()
        assert inbox.drain(5, broker) == list(range(5))
        inbox.consumer.cancel()
        producer.publish("back", routing_key=name)
        assert inbox.channel.basic_get(name).payload == "back"
    broker.wait_until(lambda: server.client().llen(name) == 1, "it is requeued")
