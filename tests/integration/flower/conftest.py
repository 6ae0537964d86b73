"""A Flower that the tests of a file share, and one of a test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.served_flower import (
    LOGGED_IN_BY_PROXY,
    PATIENCE,
    PROXY,
    READ_ONLY_LOGIN,
    REDIS_PASSWORD,
    ServedFlower,
    run_task,
    start_flower,
    start_worker,
)
from tests.support.world import World


@pytest.fixture(scope="module")
def redis(shared_world: World) -> RedisServer:
    """A server for tests that do it no harm; each that counts messages has a database of its own."""
    return shared_world.redis(REDIS_PASSWORD)


@pytest.fixture(scope="module")
def worker(shared_world: World, redis: RedisServer) -> str:
    """The name of a worker that stays."""
    start_worker(shared_world, redis.url(), "keeper@shop")
    return "keeper@shop"


@pytest.fixture(scope="module")
def flower(shared_world: World, redis: RedisServer) -> ServedFlower:
    """Flower under a prefix, in surroundings that want everything otherwise."""
    directory = shared_world.path("flower")
    directory.mkdir()
    (directory / "flowerconfig.py").write_text("basic_auth = ['evil:evil']\nurl_prefix = 'evil'\n")
    hostile = {
        "FLOWER_ADDRESS": "127.0.0.3",
        "FLOWER_BASIC_AUTH": "evil:evil",
        "FLOWER_MAX_TASKS": "1",
        "FLOWER_PORT": str(free_port()),
        "FLOWER_READ_ONLY": "true",
        "FLOWER_UNAUTHENTICATED_API": "true",
        "FLOWER_URL_PREFIX": "evil",
    }
    settings = {
        "FLOWER_URL_PREFIX": "/flower",
        "LOG_LEVEL": "debug",
        "FLOWER_READ_ONLY_AUTH": READ_ONLY_LOGIN,
        "FLOWER_TRUSTED_HEADER": next(iter(LOGGED_IN_BY_PROXY)),
        "FLOWER_TRUSTED_PROXIES": f"{PROXY},127.7.0.0/16",
    }
    return start_flower(shared_world, redis, directory, settings, hostile).ready()


@pytest.fixture
def serve(world: World) -> Callable[..., ServedFlower]:
    """Start a Flower of the test's own; started again, it finds the last one's database."""

    def start(redis: RedisServer | None, port: int = 0, **settings: str) -> ServedFlower:
        return start_flower(world, redis, world.directory / "flower", settings, port=port)

    return start


@pytest.fixture(scope="module")
def task(flower: ServedFlower, worker: str, redis: RedisServer) -> str:
    """A task that Flower has seen from its sending to its end, and whose worker it has asked about itself."""
    uuid = run_task(redis.url())
    flower.until(lambda: flower.tasks().get(uuid, {}).get("state") == "SUCCESS", PATIENCE, "the task's end is seen")
    flower.until(lambda: "stats" in flower.ask("/api/workers").json.get(worker, {}), PATIENCE, "the worker is known")
    return uuid
