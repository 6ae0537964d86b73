"""Flower and its Redis: its health while that is away, and its queues and events over every kind of URL."""

import asyncio
import html
import json
import re
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest
from celery import Celery

from services.broker.client import connect
from services.broker.keys import get_lists
from services.flower.health import LivenessProbe, get_local_host
from tests.integration.flower.conftest import Serve
from tests.support.harness import Harness
from tests.support.ports import free_port
from tests.support.redis.server import RedisServer
from tests.support.redis.urls import AWKWARD, FORMS, MORE, start_server
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
    # Flower starts before Redis.
    own_redis.kill()
    served = serve(own_redis, FLOWER_URL_PREFIX="/flower")
    served.until(lambda: served.health() == 503, TIMEOUT, "Flower answers without Redis")
    served.until(served.heartbeat.exists, TIMEOUT, "there is a heartbeat without Redis")
    own_redis.start()
    served.ready()
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


@pytest.mark.parametrize("form", FORMS)
def test_queue_lengths_and_events_come_over_every_kind_of_url(form: str, harness: Harness, serve: Serve) -> None:
    _, settings = start_server(harness, form, database=7, options=MORE)
    flower = serve(None, **(settings | {"CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0"})).ready()
    with connect(flower.settings.broker_url, flower.settings) as client:
        for key in get_lists("celery"):
            client.rpush(key, "a message", "another")
    assert flower.ask("/api/queues/length").json == {"active_queues": [{"name": "celery", "messages": 8}]}
    page = flower.ask("/broker").text
    assert re.search(r"<td>celery</td>\s*<td[^>]*>8</td>", page)
    assert html.unescape(page).count(flower.settings.broker_url.mask()) == 1
    assert quote(AWKWARD, safe="") not in page + flower.process.log()


def lose_a_message(redis: RedisServer) -> None:
    """Leave an unacknowledged, expired message, as a worker that died long ago does."""
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="orphans")
    client = redis.client()
    message = client.rpop("orphans")
    assert isinstance(message, str)
    client.hset("unacked", "tag", json.dumps([json.loads(message), "", "orphans"]))
    client.zadd("unacked_index", {"tag": 1})


def test_flower_shows_every_queue_and_leaves_the_unacknowledged_messages_of_workers_alone(
    own_redis: RedisServer, serve: Serve
) -> None:
    client = own_redis.client()
    served = serve(own_redis).ready()
    with Celery("client", broker=own_redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="forgotten", priority=6)
    lengths = {queue["name"]: queue["messages"] for queue in served.ask("/api/queues/length").json["active_queues"]}
    assert lengths == {"celery": 0, "forgotten": 1}
    lose_a_message(own_redis)
    for _ in range(2):
        assert served.ask("/api/workers?refresh=1").status == 200
    assert (client.hlen("unacked"), client.llen("orphans")) == (1, 0)
    # A stock consumer restores it, in its first second or later.
    with Celery("stock", broker=own_redis.url(), set_as_current=False) as app:

        def given_back() -> bool:
            app.control.inspect(timeout=1).stats()
            return (client.hlen("unacked"), client.llen("orphans")) == (0, 1)

        served.until(given_back, TIMEOUT, "it is back in its queue")
