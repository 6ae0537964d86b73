"""Options of kombu's Redis transport that Stalk's transport honours (the others are refused: test_transport_options in
tests/unit)."""

import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.app.task import Context
from kombu import Consumer, Exchange, Producer, Queue
from kombu.transport.virtual.base import UndeliverableWarning
from kombu.utils.encoding import bytes_to_str

from config import load
from config.celery import build_celery_configuration
from services.delivery.connection import Connection
from tests.support.application import create_app
from tests.support.harness import Harness
from tests.support.redis.broker import Broker, Inbox
from tests.support.redis.urls import start_server
from tests.support.waiting import TIMEOUT_SECONDS, wait_until

EVERYBODY = Exchange("everybody", "fanout")
# What redis-py's connections are made with.
OF_CONNECTIONS: dict[str, Any] = {
    "client_name": "shop",
    "health_check_interval": 7,
    "retry_on_timeout": True,
    "socket_connect_timeout": 7,
    "socket_keepalive": True,
    "socket_keepalive_options": {},
    "socket_timeout": 9,
}


@pytest.fixture
def broker(harness: Harness) -> Iterator[Broker]:
    broker = Broker(harness.redis(""))
    yield broker
    broker.close()


def test_every_connection_has_the_options_of_connections(broker: Broker) -> None:
    broker.send("one", "a")
    before = {one["id"] for one in broker.clients()}
    channel = broker.connect(**OF_CONNECTIONS, max_connections=5).channel()
    assert Inbox(channel, "one").drain(1, broker) == ["a"]
    broker.nothing_is_left()
    for pool in (channel.client.connection_pool, channel.pool, channel.create_pool()):
        assert OF_CONNECTIONS.items() <= pool.connection_kwargs.items()
        assert pool.max_connections == 5
    names = [one["name"] for one in broker.clients() if one["id"] not in before]
    # Those of the lease manager as well.
    assert len(names) > 1, broker.describe()
    assert set(names) == {"shop"}, broker.describe()


def test_a_body_need_not_be_encoded(broker: Broker) -> None:
    channel = broker.connect(body_encoding=None).channel()
    Producer(channel).publish({"a": 1}, routing_key="one")
    assert b'\\"a\\": 1' in broker.client.lindex("one", 0)
    assert Inbox(broker.connect().channel(), "one").drain(1, broker) == [{"a": 1}]
    broker.nothing_is_left()


def test_what_no_queue_is_bound_for_goes_where_deadletter_queue_says(broker: Broker) -> None:
    channel = broker.connect(deadletter_queue="nobody").channel()
    with pytest.warns(UndeliverableWarning):
        Producer(channel, Exchange("unknown")).publish("a", routing_key="any")
    assert broker.waiting("nobody") == ["a"]


@pytest.mark.parametrize(
    ("options", "topic"),
    [
        ({}, "/0.everybody/all"),
        ({"fanout_prefix": "/shop."}, "/shop.everybody/all"),
        ({"fanout_prefix": False}, "everybody/all"),
        ({"fanout_patterns": False}, "/0.everybody"),
    ],
)
def test_a_broadcast_goes_by_prefix_and_patterns(broker: Broker, options: dict[str, Any], topic: str) -> None:
    assert broadcast(broker.connect(**options), broker) == (["a"], 2, [topic])


def test_a_broadcast_on_both_topics_of_sentinels_is_heard_once(harness: Harness) -> None:
    server, variables = start_server(harness, "sentinel")
    broker = Broker(server)
    broker.client = server.client()
    settings = build_celery_configuration(load(variables))
    options = settings["broker_transport_options"] | {"sentinel_fanout_compat": True}
    with Connection(settings["broker_url"], transport_options=options) as connection:
        assert broadcast(connection, broker) == (["a"], 2, ["/0.everybody/all", "/{db}.everybody/all"])


def test_results_have_the_prefix_that_their_options_say(broker: Broker) -> None:
    url = broker.server.url()
    app = create_app(load({"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}))
    app.conf.result_backend_transport_options["global_keyprefix"] = "shop:"
    app.backend.store_result("one", 7, "SUCCESS")
    assert app.AsyncResult("one").get(timeout=TIMEOUT_SECONDS) == 7
    app.backend.store_result("two", None, "RETRY", request=Context(id="two", retries=1))
    assert sorted(broker.client.keys()) == [b"shop:celery-task-meta-one", b"shop:celery-task-meta-two"]


def broadcast(connection: Any, broker: Broker) -> tuple[list[str], int | None, list[str]]:
    """What a node hears of a broadcast, how many have heard it by the sender's count, and on which topics it was.

    Those that hear it are the node, and this test.
    """
    with broker.client.pubsub() as witness:
        witness.psubscribe("*everybody*")
        wait_until(broker.client.pubsub_numpat, TIMEOUT_SECONDS, "the witness listens", broker.describe)
        node, sender = connection.channel(), connection.channel()
        node.bodies = []
        queue = Queue("a node", EVERYBODY, routing_key="all", auto_delete=True)
        with Consumer(node, [queue], callbacks=[lambda body, message: node.bodies.append(body)], no_ack=True):
            drain_until(connection, lambda: broker.client.pubsub_numpat() > 1, broker)
            Producer(sender, EVERYBODY).publish("a", routing_key="all")
            drain_until(connection, lambda: node.bodies, broker)
            drain_until(connection, lambda: True, broker)
        # The first one says that it listens.
        messages = [
            witness.get_message(timeout=TIMEOUT_SECONDS) for _ in range(1 + len(node._get_publish_topics("", "")))
        ]
    return node.bodies, sender.heard, [bytes_to_str(message["channel"]) for message in messages[1:]]


def drain_until(connection: Any, condition: Callable[[], object], broker: Broker) -> None:
    """Have a connection deliver what comes, until something is so."""

    def look() -> object:
        with suppress(socket.timeout):
            connection.drain_events(timeout=0.2)
        return condition()

    wait_until(look, TIMEOUT_SECONDS, "the broadcast goes on", broker.describe)
