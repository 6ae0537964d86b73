"""What several folders of tests share: an empty Redis for each test of a file, and a checkout with odd tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.checkout import odd_checkout
from tests.support.redis.broker import Broker
from tests.support.redis.server import RedisServer
from tests.support.world import World


@pytest.fixture(scope="module")
def server(shared_world: World) -> RedisServer:
    return shared_world.redis("", lines=["appendonly no"])


@pytest.fixture
def broker(server: RedisServer) -> Iterator[Broker]:
    broker = Broker(server)
    server.make_room()
    broker.client.flushall()
    yield broker
    server.make_room()
    broker.close()


@pytest.fixture(scope="module")
def odd_world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The file's world, whose nodes have the task modules odd_tasks, odd_broadcast and odd_dedupe too."""
    shared_world.checkout = odd_checkout(tmp_path_factory.mktemp("odd") / "code")
    return shared_world
