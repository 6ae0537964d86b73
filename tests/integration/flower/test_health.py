"""Flower's health check and heartbeat, with a Redis that dies, freezes and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from services.flower.health import LivenessProbe, get_local_host
from tests.integration.flower.conftest import Serve
from tests.support.ports import free_port
from tests.support.redis.server import RedisServer
from tests.support.served_flower import TIMEOUT, send_events


@pytest.mark.parametrize(
    ("fault", "end"),
    [(RedisServer.kill, RedisServer.start), (RedisServer.freeze, RedisServer.thaw)],
    ids=["killed", "frozen"],
)
def test_health_follows_redis_and_the_heartbeat_does_not(
    fault: Callable[[RedisServer], None],
    end: Callable[[RedisServer], None],
    own_redis: RedisServer,
    serve: Serve,
) -> None:
    served = serve(own_redis, FLOWER_URL_PREFIX="/flower").ready()
    served.wait_for_task(send_events(own_redis.url())[0])
    fault(own_redis)
    served.until(lambda: served.health() == 503, TIMEOUT, "the health check says that Redis is away")
    answer = served.ask("/healthcheck", login=None)
    assert answer.text.count("\n") == 1
    assert "127.0.0.1" not in answer.text
    assert served.ask("/api/queues/length").status == 503
    away = time.time()
    served.until(lambda: served.heartbeat.stat().st_mtime > away, TIMEOUT, "the heartbeat goes on")
    assert served.health() == 503
    end(own_redis)
    served.until(lambda: served.health() == 200, TIMEOUT, "the health check says that Redis is back")
    served.until(lambda: send_events(own_redis.url())[0] in served.tasks(), TIMEOUT, "events arrive again")
    assert "Traceback" not in served.process.log()


def test_flower_that_starts_before_redis_is_unhealthy_until_redis_is_there(
    own_redis: RedisServer, serve: Serve
) -> None:
    own_redis.kill()
    served = serve(own_redis)
    served.until(lambda: served.health() == 503, TIMEOUT, "Flower answers without Redis")
    served.until(served.heartbeat.exists, TIMEOUT, "there is a heartbeat without Redis")
    own_redis.start()
    served.ready().wait_for_task(send_events(own_redis.url())[0])


def test_the_health_check_is_cheap(own_redis: RedisServer, serve: Serve) -> None:
    """It uses the connection that receives events."""
    served = serve(own_redis).ready()
    client = own_redis.client()
    before = client.info("stats")["total_connections_received"]
    for _ in range(200):
        served.healthy()
    # Flower's timers may open some connections meanwhile.
    assert client.info("stats")["total_connections_received"] - before < 100


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - as Flower does
        ("127.0.0.1", "127.0.0.1"),
        ("::", "[::1]"),
        ("[::1]", "[::1]"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_flower_asks_itself_where_it_listens(address: str, host: str) -> None:
    assert get_local_host(address) == host


def test_there_is_no_heartbeat_when_nothing_answers() -> None:
    beats: list[int] = []

    async def beat() -> None:
        await LivenessProbe("127.0.0.1", free_port(), "", lambda: beats.append(1)).check()

    asyncio.run(beat())
    assert not beats
