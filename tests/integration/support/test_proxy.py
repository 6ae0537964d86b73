"""The proxy drops exactly what it is told to, and otherwise nobody notices it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.redis.proxy import Command, Proxy, frame_end, frames, words
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS, wait_until
from tests.support.world import World


@pytest.fixture
def server(world: World) -> RedisServer:
    return world.redis()


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


@pytest.mark.parametrize(
    "frame",
    [
        b"+OK\r\n",
        b":12\r\n",
        b"$-1\r\n",
        b"$4\r\na\r\nb\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"*2\r\n$1\r\na\r\n*1\r\n:1\r\n",
        b"%1\r\n+a\r\n:1\r\n",
        b"_\r\n",
    ],
)
def test_a_value_ends_where_it_ends(frame: bytes) -> None:
    assert frame_end(frame + b"+more\r\n") == len(frame)
    assert [frame_end(frame[:length]) for length in range(len(frame))] == [-1] * len(frame)


def test_an_incomplete_value_stays_in_the_buffer() -> None:
    buffer = bytearray(b":1\r\n$5\r\nab")

    assert frames(buffer) == [b":1\r\n"]
    assert buffer == b"$5\r\nab"


def test_a_command_is_read_word_by_word() -> None:
    assert words(b"*3\r\n$3\r\nSET\r\n$0\r\n\r\n$4\r\n\r\n\r\n\r\n") == (b"SET", b"", b"\r\n\r\n")


def test_commands_pass_and_so_do_large_replies_and_subscriptions(client: redis.Redis) -> None:
    large = "x" * 300_000
    client.set("key", large)
    assert client.get("key") == large
    with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.subscribe("channel")
        pubsub.get_message(timeout=TIMEOUT_SECONDS)
        client.publish("channel", "word")
        assert pubsub.get_message(timeout=TIMEOUT_SECONDS)["data"] == "word"


def test_a_dropped_reply_is_of_a_command_that_redis_has_done(
    proxy: Proxy, client: redis.Redis, server: RedisServer
) -> None:
    trap = proxy.drop_reply(lambda command, _: command.name == b"INCRBY")
    assert client.get("number") is None
    with pytest.raises(redis.ConnectionError):
        client.incr("number")
    assert trap.dropped.is_set()
    assert server.client().get("number") == "1"
    # The next one is not.
    assert client.incr("number") == 2


def test_a_transaction_is_known_by_what_is_in_it(proxy: Proxy, client: redis.Redis) -> None:
    def pushes(command: Command) -> bool:
        return command.words[:2] == (b"LPUSH", b"list")

    trap = proxy.drop_reply(lambda command, _: command.name == b"EXEC" and command.any(pushes))
    with client.pipeline() as pipe:
        pipe.set("other", 1)
        assert pipe.execute() == [True]
    with client.pipeline() as pipe, pytest.raises(redis.ConnectionError):
        pipe.lpush("list", "a")
        pipe.execute()
    assert trap.dropped.is_set()


def test_a_reply_decides_too(proxy: Proxy, client: redis.Redis) -> None:
    trap = proxy.drop_reply(lambda command, reply: command.name == b"GET" and b"wanted" in reply)
    client.set("key", "other")
    assert client.get("key") == "other"
    client.set("key", "wanted")
    with pytest.raises(redis.ConnectionError):
        client.get("key")
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


def test_a_server_that_is_away_refuses_through_the_proxy_too(
    proxy: Proxy, client: redis.Redis, server: RedisServer
) -> None:
    server.kill()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    server.start()
    assert client.ping()
