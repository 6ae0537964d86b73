"""kombu over services/delivery, without Celery: connections, consumers, and what Redis has."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import redis
from kombu import Consumer, Producer, Queue
from kombu.mixins import ConsumerMixin
from kombu.utils.json import loads

from services.broker.keys import UNACKED, UNACKED_INDEX, UNACKED_LEASES, UNACKED_STARTED
from services.delivery.connection import Connection
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS, wait_until

# What an answer of Redis may take before a connection counts as dead.
SOCKET_SECONDS = 10
# So long that no lease ends during all tests of a file, and that none is renewed or swept in the middle of one: that
# happens after a third of this.
LEASE = 36_000
OPTIONS = {"lease": LEASE, "socket_timeout": SOCKET_SECONDS, "socket_connect_timeout": SOCKET_SECONDS}
# Seconds to watch for what must not happen.
QUIET = 1.0


class Broker:
    """One Redis, and what a test connects to it."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        # redis-py's types say str or bytes of everything.
        self.client: Any = redis.Redis(port=server.port, socket_timeout=SOCKET_SECONDS)
        self._open: list[Any] = []

    def connect(self, url: str = "", **options: Any) -> Any:
        connection = Connection(url or self.server.url(), transport_options={**OPTIONS, **options})
        self._open.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._open:
            with suppress(Exception):
                connection.close()

    def send(self, queue: str, *bodies: Any, **properties: Any) -> None:
        """Publish over a connection that is closed again."""
        with Connection(self.server.url(), transport_options=OPTIONS) as connection:
            producer = Producer(connection.channel())
            for body in bodies:
                producer.publish(body, routing_key=queue, **properties)

    def count_unacked(self) -> int:
        """How many messages are unacknowledged; asserts that the keys about them agree."""
        unacked = int(self.client.hlen(UNACKED))
        assert unacked == self.client.zcard(UNACKED_INDEX) == self.client.zcard(UNACKED_LEASES), self.describe()
        return unacked

    def waiting(self, queue: str) -> list[Any]:
        """The bodies in a queue's list, the next one first."""
        with Connection(self.server.url(), transport_options=OPTIONS) as connection:
            channel = connection.channel()
            payloads = [loads(raw) for raw in self.client.lrange(queue, 0, -1)]
            for payload in payloads:
                payload["properties"].setdefault("delivery_tag", "")
            return [channel.Message(payload, channel=channel).decode() for payload in reversed(payloads)]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Like tests.support.waiting.wait_until, with this Redis as the context."""
        wait_until(condition, TIMEOUT_SECONDS, what, self.describe)

    def nothing_is_left(self) -> None:
        """Wait until nothing is unacknowledged."""
        self.wait_until(lambda: not self.client.exists(UNACKED), "nothing is unacknowledged")
        for key in (UNACKED_INDEX, UNACKED_LEASES, UNACKED_STARTED):
            assert not self.client.exists(key), self.describe()

    def commands(self) -> Counter[str]:
        """How often each command has been called."""
        statistics = self.client.info("commandstats")
        return Counter({name.removeprefix("cmdstat_"): each["calls"] for name, each in statistics.items()})

    def clients(self) -> list[dict[str, str]]:
        """The connections of Redis, without the test's own."""
        own = self.client.client_id()
        return [one for one in self.client.client_list() if int(one["id"]) != own]

    def wait_idle(self, consumers: int) -> None:
        """Wait until so many consumers have found their lists empty and wait for notifications."""

        def idle() -> bool:
            return sum(1 for one in self.clients() if "t" in one["flags"] and one["cmd"] == "exists") >= consumers

        wait_until(idle, TIMEOUT_SECONDS, f"{consumers} consumers are idle", self.describe, look=0.005)

    def describe(self) -> str:
        """All keys, connections and threads, for the report of a failed test."""
        lines = [f"{key!r}: {self._value(key)}" for key in sorted(self.client.keys("*"))]
        return "\n".join([*lines, *(str(one) for one in self.clients()), f"threads: {threading.enumerate()}"])

    def _value(self, key: bytes) -> Any:
        reads = {
            b"list": lambda: self.client.lrange(key, 0, 20),
            b"hash": lambda: self.client.hgetall(key),
            b"zset": lambda: self.client.zrange(key, 0, -1, withscores=True),
            b"set": lambda: self.client.smembers(key),
        }
        return reads.get(self.client.type(key), lambda: self.client.get(key))()


class Inbox:
    """A consumer that keeps what it gets."""

    def __init__(self, channel: Any, *queues: str, prefetch: int = 0, ack: bool = True, no_ack: bool = False) -> None:
        self.channel, self.messages, self._ack = channel, [], ack  # type: ignore[var-annotated]
        self.consumer = Consumer(
            channel, [Queue(name, no_declare=True) for name in queues], callbacks=[self._got], no_ack=no_ack
        )
        if prefetch:
            self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    def _got(self, body: Any, message: Any) -> None:
        self.messages.append(message)
        if self._ack:
            message.ack()

    @property
    def bodies(self) -> list[Any]:
        return [message.payload for message in self.messages]

    def drain(self, expected: int, broker: Broker) -> list[Any]:
        """Wait until as many messages have come; their bodies."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while len(self.messages) < expected:
            assert time.monotonic() < end, f"{self.bodies} came, not {expected}\n{broker.describe()}"
            with suppress(socket.timeout):
                self.channel.connection.client.drain_events(timeout=0.5)
        return self.bodies

    def stays_at(self, expected: int, seconds: float = QUIET) -> None:
        """Drain for a while and assert that nothing more comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(socket.timeout):
                self.channel.connection.client.drain_events(timeout=0.2)
        assert len(self.messages) == expected, self.bodies


class Listener(ConsumerMixin):  # type: ignore[misc]
    """A consumer that runs in a thread and connects again by itself, as kombu offers it."""

    def __init__(self, connection: Any, *queues: str, pause: float = 0.0) -> None:
        self.connection, self._queues, self._pause = connection, queues, pause
        self.bodies: list[Any] = []
        self.consuming = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True, kwargs={"safety_interval": 0.5})

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:  # noqa: N803 - kombu's name
        channel.basic_qos(prefetch_count=1)
        queues = [Queue(name, no_declare=True) for name in self._queues]
        return [Consumer(queues, callbacks=[self._on_message])]

    def on_consume_ready(self, *_: Any, **__: Any) -> None:
        self.consuming.set()

    def _on_message(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        time.sleep(self._pause)
        message.ack()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Consume; the thread has ended afterwards."""
        self._thread.start()
        try:
            assert self.consuming.wait(TIMEOUT_SECONDS)
            yield self
        finally:
            self.should_stop = True
            self._thread.join(TIMEOUT_SECONDS)
            assert not self._thread.is_alive(), "the consumer did not stop"
