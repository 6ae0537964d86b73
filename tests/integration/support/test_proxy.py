"""The proxy drops exactly what it is told to, and otherwise nobody notices it."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.harness import Harness
from tests.support.redis.proxy import Command, Proxy, frame_end
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS, wait_until


@pytest.fixture
def server(harness: Harness) -> RedisServer:
    return harness.redis()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(params=[2, 3])
def client(request: pytest.FixtureRequest, server: RedisServer, proxy: Proxy) -> redis.Redis:
    """A client that repeats nothing by itself."""
    return redis.Redis(
        port=proxy.port,
        password=server.password,
        protocol=request.param,
        socket_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


# Commands whose replies are of every kind and shape, and what redis-py makes of them.
REPLIES: dict[tuple[object, ...], object] = {
    ("SET", "", "a\r\nb"): True,
    ("GET", ""): "a\r\nb",
    ("STRLEN", ""): 4,
    ("GET", "nothing"): None,
    ("LRANGE", "nothing", 0, -1): [],
    ("BLPOP", "nothing", 0.01): None,
    ("EVAL", "return {{}, {1, {'a', false}}}", 0): [[], [1, ["a", None]]],
    ("HSET", "hash", "field", "value"): 1,
    ("HGETALL", "hash"): {"field": "value"},
    ("ECHO", "x" * 300_000): "x" * 300_000,
}


def test_commands_pass_and_are_told_with_the_whole_of_their_reply(proxy: Proxy, client: redis.Redis) -> None:
    passed: list[tuple[tuple[bytes, ...], bytes]] = []

    def note(command: Command, reply: bytes) -> bool:
        passed.append((command.words, reply))
        return False

    proxy.drop_reply(note)
    for command, expected in REPLIES.items():
        assert client.execute_command(*command) == expected  # type: ignore[no-untyped-call]
        # Before the first, redis-py says who it is.
        words, reply = passed[-1]
        assert words == tuple(str(word).encode() for word in command)
        assert frame_end(reply + b"+more\r\n") == len(reply)
        assert {frame_end(reply[:length]) for length in range(min(len(reply), 100))} == {-1}


def test_subscriptions_pass(client: redis.Redis) -> None:
    with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe("channel")
        pubsub.get_message(timeout=TIMEOUT_SECONDS)
        client.publish("channel", "word")
        assert pubsub.get_message(timeout=TIMEOUT_SECONDS)["data"] == "word"


def test_redis_has_done_what_a_dropped_reply_is_of(proxy: Proxy, client: redis.Redis, server: RedisServer) -> None:
    trap = proxy.drop_reply(lambda command, _: command.name == b"INCRBY")
    assert client.get("number") is None
    with pytest.raises(redis.ConnectionError):
        client.incr("number")
    assert trap.dropped.is_set()
    assert server.client().get("number") == "1"
    # The next one is not.
    assert client.incr("number") == 2


def test_a_transaction_is_known_by_what_is_in_it_and_by_its_reply(proxy: Proxy, client: Any) -> None:
    def pushes(command: Command) -> bool:
        return command.words[:2] == (b"LPUSH", b"list")

    def push(pipe: Any) -> Any:
        return pipe.lpush("list", "a").execute()

    trap = proxy.drop_reply(lambda command, reply: command.name == b"EXEC" and command.any(pushes) and b":2" in reply)
    assert client.pipeline().set("other", 2).execute() == [True]
    assert push(client.pipeline()) == [1]
    with pytest.raises(redis.ConnectionError):
        push(client.pipeline())
    assert trap.dropped.is_set()


def test_a_cut_connection_is_reset_and_the_next_one_works(proxy: Proxy, client: redis.Redis) -> None:
    before = client.client_id()
    assert proxy.cut() == 1
    wait_until(lambda: not proxy.connections(), TIMEOUT_SECONDS, "it is cut")
    # redis-py sees the end of an idle connection and takes another.
    assert client.client_id() != before


def test_a_half_open_connection_swallows_what_comes(proxy: Proxy, client: redis.Redis, server: RedisServer) -> None:
    client.set("key", "1")
    assert proxy.half_open() == 1
    # Only this reply is awaited in vain.
    connection = client.connection_pool.get_connection()
    connection.send_command("SET", "key", "2")  # type: ignore[no-untyped-call]
    with pytest.raises(redis.TimeoutError):
        connection.read_response(timeout=0.5)
    client.connection_pool.release(connection)
    assert server.client().get("key") == "1"
    assert client.get("key") == "1"


def test_a_server_that_is_away_refuses_through_it(proxy: Proxy, client: redis.Redis, server: RedisServer) -> None:
    server.kill()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    server.start()
    assert client.ping()
