"""Nodes and clients that reconnect again and again, for months, keep nothing of their old connections."""

import gc
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kombu import Consumer, Exchange, Producer, Queue
from redis.exceptions import RedisError

from services.control.mailbox import Mailbox
from services.delivery.connection import Connection
from tests.support.harness import START_SECONDS, Harness, Stack
from tests.support.redis.broker import OPTIONS, Broker, Inbox
from tests.support.redis.proxy import Proxy
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

# A reply takes milliseconds, and longer on a busy machine.
ANSWER_SECONDS = 60
# What each leaves behind adds up to so much that it stands out.
RECONNECTS = (20, pytest.param(1000, marks=pytest.mark.slow))
# After these, everything that is made on first use has been made.
WARM_UP = 10
# What the allocator keeps after its busiest moment, which comes in the first hundred; each leaked 75 KB at least.
GROWTH_BYTES = 12 * 2**20
# Hundreds, and seconds.
CLIENT_RECONNECTS = 100
RESIDENT = "resident bytes"
# Python's own caches, of isinstance for example, grow a little.
UNCOUNTED = ("builtins.", "weakref.", "urllib.", RESIDENT)


@pytest.fixture(params=POOLS)
def stack(request: pytest.FixtureRequest, harness: Harness) -> Stack:
    """A single node."""
    stack = harness.stack()
    options = f"--pool={request.param} --concurrency=1 --hostname=node0@%h --loglevel=info --without-gossip"
    stack.celery(f"worker {options}").ready()
    return stack


def listeners(redis: RedisServer) -> set[str]:
    """The connections on which nodes hear commands."""
    return {one["id"] for one in redis.client().client_list(_type="pubsub") if one["psub"] != "0"}


def wait_idle(stack: Stack) -> None:
    """Wait until the node hears commands and waits for tasks."""

    def idle() -> bool:
        waits = [one for one in stack.redis.client().client_list() if "t" in one["flags"] and one["cmd"] == "exists"]
        return bool(waits) and len(listeners(stack.redis)) == 1

    stack.harness.wait_until(idle, TIMEOUT_SECONDS, "the node is idle")


def cut(redis: RedisServer) -> None:
    """End all connections but the one that does this."""
    for kind in ("normal", "pubsub"):
        redis.client().client_kill_filter(_type=kind, skipme=True)


def reconnect(stack: Stack, times: int) -> None:
    """Cut the node off, as often as that; it is back each time."""
    for _ in range(times):
        before = listeners(stack.redis)
        cut(stack.redis)
        connected = lambda: listeners(stack.redis) - before  # noqa: E731, B023
        stack.harness.wait_until(connected, TIMEOUT_SECONDS, "the node is connected again")


def census(stack: Stack) -> dict[str, int]:
    """Count the objects of a node, when it has run a task and replied to a command."""
    label = f"task-{len(stack.harness.notes('end'))}"
    wait_idle(stack)
    stack.send("probe.mark", label, ignore_result=True)
    stack.harness.wait_until(lambda: stack.harness.ended(label), START_SECONDS, f"{label} ends")
    # The first reply makes objects that the second one counts.
    for _ in range(2):
        wait_idle(stack)
        with stack.client.connection_for_write() as connection:
            [answer] = stack.client.control.broadcast(
                "census", reply=True, timeout=ANSWER_SECONDS, limit=1, connection=connection
            )
    [counts] = answer.values()
    return dict(counts)


def find_growth(before: dict[str, int], after: dict[str, int], least: int) -> dict[str, int]:
    """What there is at least so much more of; a little more, such as a spare connection, is no leak."""
    more = {name: count - before.get(name, 0) for name, count in after.items() if not name.startswith(UNCOUNTED)}
    return {name: count for name, count in more.items() if count >= least}


@pytest.mark.parametrize("times", RECONNECTS)
def test_a_node_keeps_nothing_of_a_connection_that_was_cut(stack: Stack, times: int) -> None:
    reconnect(stack, WARM_UP)
    before = census(stack)
    reconnect(stack, times)
    after = census(stack)

    assert find_growth(before, after, times // 2) == {}
    assert after[RESIDENT] - before[RESIDENT] < GROWTH_BYTES, (before, after)


# --- Clients of kombu, without Celery


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    """pytest keeps what is logged, and with an error all objects of its frames."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def count_objects() -> dict[str, int]:
    """Count what this process has."""
    gc.collect()
    kinds = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, gc.get_objects()))
    return {**kinds, "file descriptors": len([*Path("/proc/self/fd").iterdir()])}


EVERYBODY = Exchange("everybody", "fanout")


def publish(broker: Broker, connection: Any) -> None:
    """A producer whose connection is cut before each message."""
    producer = Producer(connection.default_channel)
    cut(broker.server)
    producer.publish("a", routing_key="one", retry=True, retry_policy={"max_retries": 3, "interval_start": 0})


def consume(broker: Broker, _: Any) -> None:
    """A consumer that connects again for each message, as kombu's does when its connection was cut."""
    connection = Connection(broker.server.url(), transport_options=OPTIONS)
    inbox = Inbox(connection.channel(), "one", prefetch=1)
    broker.send("one", "a")
    inbox.drain(1, broker)
    cut(broker.server)
    with suppress(OSError, RedisError):
        connection.drain_events(timeout=0.01)
    connection.collect()


def listen(channel: Any) -> None:
    """Begin to consume from a broadcast, over a queue of its own."""
    Consumer(channel, [Queue(uuid4().hex, EVERYBODY, auto_delete=True)], no_ack=True).consume()
    with suppress(socket.timeout):
        channel.connection.client.drain_events(timeout=0.01)


def come_and_go(_: Broker, connection: Any) -> None:
    """Consumers of a queue and of a broadcast that come and go on one connection."""
    with connection.channel() as channel:
        Inbox(channel, "one")
        listen(channel)


def ask(_: Broker, connection: Any) -> None:
    """Commands to which no node replies."""
    assert Mailbox("everybody", "fanout")(connection).multi_call("ping", timeout=0.01) == []
    channel = connection.default_channel
    assert not channel.state.exchanges["reply.everybody.pidbox"]["table"]
    assert not channel._expires


def look_at(broker: Broker, _: Any) -> None:
    """Connections that are made for their type only."""
    with Connection(broker.server.url()) as connection:
        assert connection.transport.driver_type == "redis"


# Nobody listens on port 1.
AWAY = Connection("redis://127.0.0.1:1/0")


def fail(_: Broker, __: Any) -> None:
    """Connections to a Redis that is away."""
    for connection in (AWAY, Connection(AWAY.as_uri())):
        with suppress(OSError, RedisError):
            connection.transport.establish_connection()
    # Of which kombu has 65535.
    assert not AWAY.transport._used_channel_ids


def lose(broker: Broker, _: Any) -> None:
    """Consumers of a broadcast whose Redis goes away, and is not there to delete their queue."""
    proxy = Proxy(broker.server.port)
    connection = Connection(f"redis://127.0.0.1:{proxy.port}/0", transport_options=OPTIONS)
    listen(connection.channel())
    proxy.close()
    connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("use", [publish, consume, come_and_go, ask, look_at, fail, lose])
def test_a_client_keeps_nothing_of_what_has_ended(broker: Broker, use: Callable[[Broker, Any], None]) -> None:
    connection = broker.connect()
    for _ in range(WARM_UP):
        use(broker, connection)
    before = count_objects()
    for _ in range(CLIENT_RECONNECTS):
        use(broker, connection)
    assert find_growth(before, count_objects(), CLIENT_RECONNECTS // 2) == {}
