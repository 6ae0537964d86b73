"""Liveness: what is alive stays alive through outages and long tasks, what stands still is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

import pytest

from services.supervisor.heartbeat_file import OLDEST_SECONDS, READY, STARTING, STUCK, TICKING, WAITING
from tests.integration.worker.test_worker import node_process
from tests.support.checkout import ROOT, odd_checkout
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.world import Node, Stack, World

# The shipped lower bound is 45 s, because a reconnect pauses up to 30 s. It is tried again 2, 6, 12, 20 and 30 s after
# it was cut off: an outage of 18 s, and of 27 s on a machine that is late, is followed by a pause of 10 s at most. And
# a dozen processes that start at the same time take a while to the first turn of their loops.
TIMEOUT = 15
OUTAGE = 18
# Heartbeats that a node has to give while it is in trouble: the first may have been on its way before.
BEATS = 3
# What its heartbeat is about, whatever the trouble.
BEATING = ("idle", "solo-at-work", "solo-in-a-batch", "redis-killed", "redis-killed-solo", "redis-frozen")
HANGING = """
import time
from pathlib import Path
from celery.signals import worker_ready
from config import variable

@worker_ready.connect
def hang(**_):
    "Keep the main thread busy for ever, the first time."
    path = Path(variable("HUNG_BEFORE"))
    if not path.exists():
        path.touch()
        time.sleep(3600)
"""


@dataclass
class Watched:
    """A node and what was seen of it during the trouble."""

    stack: Stack
    worker: Node
    pid: int = 0
    beats: set[int] = field(default_factory=set)
    words: set[str] = field(default_factory=set)

    @property
    def node(self) -> int:
        """The node's process; 0 while it has none."""
        return node_process(self.worker, "node0")

    def look(self) -> None:
        path = self.worker.heartbeat()
        self.beats.add(path.stat().st_mtime_ns)
        self.words.add(path.read_text().strip())


@pytest.fixture(scope="module")
def nodes(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Watched]:
    """Nodes in trouble of every kind, all at the same time, and what became of them."""
    world = shared_world
    # With a shorter time-out than it allows, and with a module that hangs a node.
    world.checkout = odd_checkout(tmp_path_factory.mktemp("heartbeat") / "code")
    world.checkout.replace("config/settings.py", "ge=45", "ge=1")
    world.checkout.replace("docker/supervisor/worker.conf", "startsecs=5", "startsecs=2")
    world.checkout.write("hanging.py", HANGING)
    well, killed, frozen = world.stack(), world.stack(), world.stack()
    settings = {"WORKER_HEARTBEAT_TIMEOUT": str(TIMEOUT)}
    hanging = {"CELERY_IMPORTS": "probe,hanging", "HUNG_BEFORE": str(world.directory / "hung")}
    kinds: dict[str, tuple[Stack, dict[str, str]]] = {
        "idle": (well, {"WORKER_POOL": "prefork"}),
        "solo-at-work": (well, {"WORKER_POOL": "solo"}),
        "solo-in-a-batch": (
            well,
            {"WORKER_POOL": "solo", "WORKER_PREFETCH_MULTIPLIER": "2", "CELERY_IMPORTS": "probe,odd_tasks"},
        ),
        "in-c-code": (well, {"WORKER_POOL": "solo"}),
        "stopped": (well, {"WORKER_POOL": "threads"}),
        "hanging": (well, {"WORKER_POOL": "threads", **hanging}),
        "redis-killed": (killed, {"WORKER_POOL": "prefork"}),
        "redis-killed-solo": (killed, {"WORKER_POOL": "solo"}),
        "redis-frozen": (frozen, {"WORKER_POOL": "threads"}),
    }
    found = {
        kind: Watched(stack, stack.worker(WORKER_QUEUES=kind, **settings, **more))
        for kind, (stack, more) in kinds.items()
    }
    for kind, watched in found.items():
        if kind != "hanging":
            watched.worker.ready()
        watched.worker.says("entered RUNNING")
        # Supervisor says so after a while, whatever the node has come to.
        world.wait_until(watched.worker.heartbeat().exists, TIMEOUT_SECONDS, f"{kind} has a heartbeat")
        watched.pid = watched.node
    well.send("probe.burn", "solo-at-work", OUTAGE, queue="solo-at-work")
    well.send("probe.grip", "in-c-code", OUTAGE + 4, queue="in-c-code")
    for label in ("solo-in-a-batch", "solo-in-a-batch-too"):
        well.send("odd_tasks.in_batches", label, "hold", queue="solo-in-a-batch")
    killed.send("probe.rest", "redis-killed-solo", OUTAGE - 6, queue="redis-killed-solo")
    for label in ("solo-at-work", "solo-in-a-batch", "in-c-code", "redis-killed-solo"):
        world.wait_started(label)
    os.kill(found["stopped"].pid, signal.SIGSTOP)
    killed.redis.kill()
    frozen.redis.freeze()
    end = monotonic() + OUTAGE

    def over() -> bool:
        for watched in found.values():
            watched.look()
        # A node finds out that Redis does not answer when its loop has stood still for a while.
        waits = "waiting" in found["redis-frozen"].words
        return monotonic() > end and waits and all(len(found[kind].beats) >= BEATS for kind in BEATING)

    world.wait_until(over, TIMEOUT_SECONDS, "the outage is over, and all hearts have beaten in it")
    world.release("solo-in-a-batch-batch")
    killed.redis.start()
    frozen.redis.thaw()
    return found


# That their hearts have beaten, and that the one whose Redis was frozen has said that it waits, the fixture waits for.
@pytest.mark.parametrize("kind", [*BEATING, "in-c-code"])
def test_a_node_that_is_alive_is_not_restarted_and_works_on(nodes: dict[str, Watched], kind: str) -> None:
    assert kind not in BEATING or "stuck" not in nodes[kind].words

    check_works(nodes[kind], kind)

    assert nodes[kind].node == nodes[kind].pid
    assert nodes[kind].worker.process.count("watchdog: killing") == 0


@pytest.mark.parametrize(
    ("kind", "reason"), [("stopped", "no heartbeat for"), ("hanging", "its main loop stands still")]
)
def test_a_node_that_stands_still_is_killed_and_replaced(nodes: dict[str, Watched], kind: str, reason: str) -> None:
    worker = nodes[kind].worker.says(f"watchdog: killing node0 .*{reason}", TIMEOUT_SECONDS)

    check_works(nodes[kind], kind)

    # Once: the replacement does not inherit the blame.
    assert worker.process.count("watchdog: killing") == 1
    assert worker.process.count("spawned: 'node0'") == 2


def check_works(watched: Watched, queue: str) -> None:
    result = watched.stack.send("probe.mark", f"{queue}-afterwards", queue=queue)
    assert result.get(timeout=TIMEOUT_SECONDS) == f"{queue}-afterwards"


@pytest.mark.parametrize(
    ("files", "count", "healthy", "output"),
    [
        ({"node0": (READY, 0)}, 1, True, "1 of 1 alive"),
        ({"node0": (WAITING, OLDEST_SECONDS)}, 1, True, "1 of 1 alive"),
        ({"node0": (READY, OLDEST_SECONDS + 1)}, 1, False, "node0.heartbeat is 31 s old"),
        ({"node0": (STARTING, 0)}, 1, False, "node0.heartbeat is starting"),
        ({"node0": (STUCK, 0)}, 1, False, "node0.heartbeat is stuck"),
        ({"node0": ("", 0)}, 1, False, "node0.heartbeat is empty"),
        ({}, 1, False, "0 of 1 alive"),
        ({"beat": (TICKING, 0)}, 1, False, "0 of 1 alive"),
        ({"node0": (READY, 0), "node1": (READY, 1)}, 2, True, "2 of 2 alive"),
        ({"node0": (READY, 0), "node1": (READY, 40)}, 2, False, "1 of 2 alive"),
    ],
)
def test_the_health_check_reads_heartbeats(
    tmp_path: Path, files: dict[str, tuple[str, int]], count: int, healthy: bool, output: str
) -> None:
    now = int(time())
    # No second passes while it looks.
    (tmp_path / "date").write_text(f"#!/bin/sh\necho {now}\n")
    (tmp_path / "date").chmod(0o755)
    for name, (word, age) in files.items():
        path = tmp_path / f"{name}.heartbeat"
        path.write_text(f"{word}\n" if word else "")
        os.utime(path, (now - age, now - age))

    check = subprocess.run(
        [ROOT / "docker" / "healthcheck", "node", str(count)],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "STALK_RUN_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )

    assert (check.returncode == 0) is healthy
    assert output in check.stdout
    assert check.stderr == ""
