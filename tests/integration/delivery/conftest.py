"""A Redis that the tests of a file share, empty for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis.broker import Broker
from tests.support.redis.server import RedisServer
from tests.support.world import World


@pytest.fixture(scope="module")
def server(shared_world: World) -> RedisServer:
    return shared_world.redis("", lines=["appendonly no"])


@pytest.fixture
def broker(server: RedisServer) -> Iterator[Broker]:
    broker = Broker(server)
    broker.client.config_set("maxmemory", 0)
    broker.client.flushall()
    yield broker
    broker.client.config_set("maxmemory", 0)
    broker.close()
