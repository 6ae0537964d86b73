"""Queue lengths and events over every kind of broker URL, and that Flower takes no message."""

from __future__ import annotations

import html
import json
import re
from urllib.parse import quote

import pytest
from celery import Celery

from services.broker.client import connect
from services.broker.keys import get_lists
from tests.integration.broker.test_urls import AWKWARD, FORMS, MORE, served
from tests.integration.flower.conftest import Serve
from tests.support.redis.server import RedisServer
from tests.support.served_flower import TIMEOUT
from tests.support.world import World


@pytest.mark.parametrize("form", FORMS)
def test_queue_lengths_and_events_come_over_every_kind_of_url(form: str, world: World, serve: Serve) -> None:
    _, settings = served(world, form, database=7, options=MORE)
    flower = serve(None, **(settings | {"CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0"})).ready()
    with connect(flower.settings.broker_url, flower.settings) as client:
        for key in get_lists("celery"):
            client.rpush(key, "a message", "another")
    assert flower.ask("/api/queues/length").json == {"active_queues": [{"name": "celery", "messages": 8}]}
    page = flower.ask("/broker").text
    assert re.search(r"<td>celery</td>\s*<td[^>]*>8</td>", page)
    assert html.unescape(page).count(flower.settings.broker_url.mask()) == 1
    assert quote(AWKWARD, safe="") not in page + flower.process.log()


def test_a_queue_that_no_worker_takes_from_is_shown(own_redis: RedisServer, serve: Serve) -> None:
    served = serve(own_redis).ready()
    with Celery("client", broker=own_redis.url(), set_as_current=False) as app:
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


def test_flower_leaves_the_unacknowledged_messages_of_workers_alone(own_redis: RedisServer, serve: Serve) -> None:
    client = own_redis.client()
    served = serve(own_redis).ready()
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
