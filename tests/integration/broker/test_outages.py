"""What everything that runs says of a Redis that is away, or full: two lines a loop, and no traceback."""

from __future__ import annotations

from urllib.request import urlopen

import pytest

from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS
from tests.support.world import Node, World

# Of maxmemory: nothing is left of the headroom.
USED_UP = 1.5
# What waits in each process when its Redis is away, and when it is full.
LOOPS = {
    "stopped": {
        **dict.fromkeys(POOLS, ("lease", "consumer", "retry")),
        "beat": ("beat",),
        "flower": ("events",),
    },
    "full": {**dict.fromkeys(POOLS, ("retry",)), "beat": ("beat",), "flower": ()},
}
# Of Celery's own: a line for each try, and a text about a setting that is explicit here.
FLOOD = r"Cannot connect to|Connection to broker lost|In Celery 5\.1|Traceback"


@pytest.mark.parametrize("fault", LOOPS)
def test_an_outage_has_one_line_when_it_begins_and_one_when_it_is_over(world: World, fault: str) -> None:
    stack = world.stack(BEAT_SCHEDULE="report-free-space=1")
    redis = stack.redis
    found = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool) for pool in POOLS}
    found["beat"] = stack.beat()
    port = free_port()
    found["flower"] = flower(world, port, stack.environment(FLOWER_BASIC_AUTH="admin:correct-horse"))
    for pool in POOLS:
        found[pool].ready()
        stack.send("probe.hold", f"{pool}-held", queue=pool)
    for pool in POOLS:
        world.wait_started(f"{pool}-held")
    found["beat"].says("beat: ticking")
    found["flower"].says("Flower listens")
    world.wait_until(lambda: hears_redis(port), TIMEOUT_SECONDS, "Flower receives events")

    if fault == "stopped":
        redis.stop()
    else:
        redis.fill(USED_UP)
    for pool in POOLS:
        world.release(f"{pool}-held")
    for name, loops in LOOPS[fault].items():
        for loop in loops:
            # A solo node, which has one thread, finds its connection broken when it can store the result.
            if (name, loop) != ("solo", "consumer"):
                found[name].says(rf"{loop}: waiting for Redis at \S+ to [a-z]+ .*: \S+", TIMEOUT_SECONDS)
    if fault == "stopped":
        redis.start()
    else:
        redis.make_room()

    for name, loops in LOOPS[fault].items():
        process = found[name].process
        for loop in loops:
            found[name].says(rf"{loop}: goes on after [\d.]+ s of waiting for Redis at \S+$", TIMEOUT_SECONDS)
            assert process.count(f"{loop}: waiting for") == process.count(f"{loop}: goes on") == 1, process.tail()
        assert process.count(FLOOD) == 0, process.tail()
        assert process.count(redis.password) == 0, process.tail()


def hears_redis(port: int) -> bool:
    """Whether Flower says that events can arrive."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=TIMEOUT_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def flower(world: World, port: int, environment: dict[str, str]) -> Node:
    """Flower, as services/launch.py serves it."""
    directory = world.path("flower")
    directory.mkdir()
    arguments = f"--address 127.0.0.1 --port {port} --database {directory / 'flower.db'}"
    return Node(world, world.python("flower", f"-m services.launch flower {arguments}", environment), environment)
