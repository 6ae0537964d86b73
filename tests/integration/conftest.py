"""What several folders of tests share: an empty Redis for each test of a file, and a checkout with odd tasks."""

from collections.abc import Iterator

import pytest

from tests.support.checkout import odd_checkout
from tests.support.harness import Harness
from tests.support.redis.broker import Broker
from tests.support.redis.server import RedisServer


@pytest.fixture(scope="module")
def server(shared_harness: Harness) -> RedisServer:
    return shared_harness.redis("", lines=["appendonly no"])


@pytest.fixture
def broker(server: RedisServer) -> Iterator[Broker]:
    broker = Broker(server)
    server.make_room()
    broker.client.flushall()
    yield broker
    server.make_room()
    broker.close()


@pytest.fixture(scope="module")
def odd_world(shared_harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """The file's harness, whose nodes have the task modules odd_tasks, odd_broadcast and odd_dedupe too."""
    shared_harness.checkout = odd_checkout(tmp_path_factory.mktemp("odd") / "code")
    return shared_harness
