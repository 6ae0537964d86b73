"""Fixtures: a Flower that the tests of a file share, and one for a single test."""

from collections.abc import Callable

import pytest

from tests.support.harness import Harness
from tests.support.ports import free_port
from tests.support.redis.server import RedisServer
from tests.support.served_flower import (
    LOGGED_IN_BY_PROXY,
    PROXY,
    READ_ONLY_LOGIN,
    REDIS_PASSWORD,
    TIMEOUT,
    ServedFlower,
    run_task,
    start_flower,
    start_worker,
)

# Starts a Flower for one test, on this Redis and with these settings.
Serve = Callable[..., ServedFlower]


@pytest.fixture(scope="module")
def redis(shared_harness: Harness) -> RedisServer:
    """A Redis that the tests of a file share."""
    return shared_harness.redis(REDIS_PASSWORD)


@pytest.fixture
def own_redis(harness: Harness) -> RedisServer:
    """One for a test that counts messages or breaks it."""
    return harness.redis(REDIS_PASSWORD)


@pytest.fixture(scope="module")
def worker(shared_harness: Harness, redis: RedisServer) -> str:
    """The name of a worker that runs until the end."""
    start_worker(shared_harness, redis.url(), "worker@shop")
    return "worker@shop"


@pytest.fixture(scope="module")
def flower(shared_harness: Harness, redis: RedisServer) -> ServedFlower:
    """Flower under a prefix, with a flowerconfig.py and FLOWER_* variables that it must ignore."""
    directory = shared_harness.path("flower")
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
    return start_flower(shared_harness, redis, directory, settings, hostile).ready()


@pytest.fixture
def serve(harness: Harness) -> Serve:
    """Start a Flower for one test; a second one finds the database of the first."""

    def start(redis: RedisServer | None, port: int = 0, **settings: str) -> ServedFlower:
        return start_flower(harness, redis, harness.directory / "flower", settings, port=port)

    return start


@pytest.fixture(scope="module")
def task(flower: ServedFlower, worker: str, redis: RedisServer) -> str:
    """The id of a task that has succeeded, and whose worker Flower has inspected."""
    uuid = run_task(redis.url())
    flower.until(lambda: flower.tasks().get(uuid, {}).get("state") == "SUCCESS", TIMEOUT, "the task's end is seen")
    flower.until(lambda: "stats" in flower.ask("/api/workers").json.get(worker, {}), TIMEOUT, "the worker is known")
    return uuid
