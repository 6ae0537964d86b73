"""Queue lengths and events over every kind of broker URL, and that Flower takes no message."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from celery import Celery

from services.broker.client import connect
from services.broker.keys import get_lists
from tests.support.ports import free_port
from tests.support.redis.server import RedisServer, make_certificates, require_tls
from tests.support.served_flower import (
    REDIS_PASSWORD,
    TIMEOUT,
    ServedFlower,
)
from tests.support.world import World

MASTER = "the-master"


def over_tcp(world: World) -> dict[str, str]:
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD).url(7)}


def over_a_socket(world: World) -> dict[str, str]:
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD).socket_url(7), "REDIS_PASSWORD": REDIS_PASSWORD}


def over_tls(world: World) -> dict[str, str]:
    require_tls(world.directory)
    certificates = make_certificates(world.directory / "certificates")
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD, certificates=certificates).url(7)}


def over_sentinels(world: World, certificates: Path | None = None) -> dict[str, str]:
    master = world.redis(REDIS_PASSWORD, certificates=certificates)
    watch = [
        f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 1",
        f'sentinel auth-pass {MASTER} "{REDIS_PASSWORD}"',
    ]
    sentinel = world.redis("", lines=watch, sentinel=True, certificates=certificates)
    options = f"?ssl_ca_certs={certificates / 'ca.crt'}&ssl_min_version=TLSv1.3" if certificates else ""
    # The second is down. If the first were, redis-py would try it for 3 s with each new connection (redis-py 8.1).
    urls = [f"sentinel://127.0.0.1:{port}/7{options}" for port in (sentinel.port, free_port())]
    return {
        "CELERY_BROKER_URL": ";".join(urls),
        "CELERY_SENTINEL_MASTER": MASTER,
        "REDIS_PASSWORD": REDIS_PASSWORD,
    }


def over_sentinels_with_tls(world: World) -> dict[str, str]:
    require_tls(world.directory)
    return over_sentinels(world, make_certificates(world.directory / "certificates"))


@pytest.mark.parametrize("way", [over_tcp, over_a_socket, over_tls, over_sentinels, over_sentinels_with_tls])
def test_queue_lengths_and_events_come_over_every_kind_of_url(
    way: Callable[[World], dict[str, str]], world: World, serve: Callable[..., ServedFlower]
) -> None:
    served = serve(None, **way(world), CELERY_RESULT_BACKEND="redis://127.0.0.1:1/0").ready()
    with connect(served.settings.broker_url, served.settings) as client:
        for key in get_lists("celery"):
            client.rpush(key, "a message", "another")
    assert served.ask("/api/queues/length").json == {"active_queues": [{"name": "celery", "messages": 8}]}
    page = served.ask("/broker").text
    assert re.search(r"<td>celery</td>\s*<td[^>]*>8</td>", page)
    assert html.unescape(page).count(served.settings.broker_url.mask()) == 1
    assert quote(REDIS_PASSWORD, safe="") not in page + served.process.log()


def test_a_queue_that_no_worker_takes_from_is_shown(world: World, serve: Callable[..., ServedFlower]) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis).ready()
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="forgotten", priority=6)
    lengths = {queue["name"]: queue["messages"] for queue in served.ask("/api/queues/length").json["active_queues"]}
    assert lengths == {"celery": 0, "forgotten": 1}


def lose_a_message(redis: RedisServer) -> None:
    """Leave an unacknowledged, expired message, as a worker that died long ago does."""
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="orphans")
    client = redis.client()
    message = client.rpop("orphans")
    assert isinstance(message, str)
    client.hset("unacked", "tag", json.dumps([json.loads(message), "", "orphans"]))
    client.zadd("unacked_index", {"tag": 1})


def test_flower_leaves_the_unacknowledged_messages_of_workers_alone(
    world: World, serve: Callable[..., ServedFlower]
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    client = redis.client()
    served = serve(redis).ready()
    lose_a_message(redis)
    for _ in range(2):
        assert served.ask("/api/workers?refresh=1").status == 200
    assert (client.hlen("unacked"), client.llen("orphans")) == (1, 0)
    # A stock consumer restores it, in its first second or later.
    with Celery("stock", broker=redis.url(), set_as_current=False) as app:

        def given_back() -> bool:
            app.control.inspect(timeout=1).stats()
            return (client.hlen("unacked"), client.llen("orphans")) == (0, 1)

        served.until(given_back, TIMEOUT, "it is back in its queue")
