"""What runs in a worker container: Supervisor and its nodes, their names, their heartbeats and their restarts.

What is alive stays alive through outages and long tasks, what stands still is replaced.
"""

import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time

import pytest

from services.supervisor.heartbeat_file import OLDEST_SECONDS, READY, STARTING, STUCK, TICKING, WAITING
from tests.support.checkout import ROOT
from tests.support.harness import READY_LINE, Harness, Node, Stack
from tests.support.processes import children, command_line
from tests.support.waiting import TIMEOUT_SECONDS

# The shipped lower bound is 45 s, because a reconnect pauses up to 30 s. It is tried again 2, 6, 12, 20 and 30 s after
# it was cut off: an outage of 18 s, and of 27 s on a machine that is late, is followed by a pause of 10 s at most. And
# a dozen processes that start at the same time take a while to the first turn of their loops.
TIMEOUT = 15
OUTAGE = 18
NODES = ("node0", "node1")
# It takes so long only when one of them has not heard the question, a moment after it said that it is ready.
ANSWER_SECONDS = 20
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


def node_process(worker: Node, name: str) -> int:
    """The process of a node; 0 while it has none."""
    return next((pid for pid in children(worker.process.pid) if f"--hostname={name}@" in command_line(pid)), 0)


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
def harness(odd_world: Harness) -> Harness:
    """Code with a shorter time-out than it allows, nodes that start sooner, and modules that hang or break a node."""
    checkout = odd_world.checkout
    checkout.replace("config/settings.py", "ge=45", "ge=1")
    checkout.replace("docker/supervisor/worker.conf", "startsecs=5", "startsecs=2")
    checkout.write("hanging.py", HANGING)
    checkout.write("broken.py", 'raise RuntimeError("broken on purpose")\n')
    checkout.write("broken_late.py", "import time\ntime.sleep(3)\nimport broken\n")
    return odd_world


@pytest.fixture(scope="module")
def nodes(harness: Harness) -> dict[str, Watched]:
    """Nodes in trouble of every kind, all at the same time, and what became of them."""
    well, killed, frozen = harness.stack(), harness.stack(), harness.stack()
    settings = {"WORKER_HEARTBEAT_TIMEOUT": str(TIMEOUT)}
    hanging = {"CELERY_IMPORTS": "probe,hanging", "HUNG_BEFORE": str(harness.directory / "hung")}
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
        harness.wait_until(watched.worker.heartbeat().exists, TIMEOUT_SECONDS, f"{kind} has a heartbeat")
        watched.pid = watched.node
    well.send("probe.burn", "solo-at-work", OUTAGE, queue="solo-at-work")
    well.send("probe.grip", "in-c-code", OUTAGE + 4, queue="in-c-code")
    for label in ("solo-in-a-batch", "solo-in-a-batch-too"):
        well.send("odd_tasks.in_batches", label, "hold", queue="solo-in-a-batch")
    killed.send("probe.rest", "redis-killed-solo", OUTAGE - 6, queue="redis-killed-solo")
    for label in ("solo-at-work", "solo-in-a-batch", "in-c-code", "redis-killed-solo"):
        harness.wait_started(label)
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

    harness.wait_until(over, TIMEOUT_SECONDS, "the outage is over, and all hearts have beaten in it")
    harness.release("solo-in-a-batch-batch")
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


@pytest.fixture(scope="module")
def stack(harness: Harness) -> Stack:
    """A worker with two nodes."""
    stack = harness.stack()
    stack.worker(WORKER_PROCESSES="2", WORKER_POOL="solo").says(r"node\d entered RUNNING", times=2)
    stack.nodes[0].ready(2)
    return stack


@pytest.fixture(scope="module")
def broken(stack: Stack) -> dict[str, Node]:
    """Workers whose nodes cannot start. Early, because three tries take a while."""
    return {module: stack.worker(CELERY_IMPORTS=module) for module in ("broken", "broken_late")}


def names(stack: Stack) -> list[str]:
    """The nodes that answer."""
    answers = stack.client.control.ping(timeout=ANSWER_SECONDS, limit=len(NODES))
    return sorted(name for answer in answers for name in answer)


def wait_answers(stack: Stack) -> None:
    expected = [f"{node}@{os.uname().nodename}" for node in NODES]
    stack.harness.wait_until(lambda: names(stack) == expected, TIMEOUT_SECONDS, "both nodes answer to their names")


def test_each_node_has_a_heartbeat_of_its_own(stack: Stack) -> None:
    stack.harness.wait_until(
        lambda: [stack.nodes[0].heartbeat(node).read_text() for node in NODES] == ["ready\n", "ready\n"],
        TIMEOUT_SECONDS,
        "each node's own heartbeat says ready",
    )


def test_a_task_that_is_not_safe_from_the_death_of_its_worker_is_named(stack: Stack) -> None:
    stack.nodes[0].says(r"WARNING .*probe\.hasty has acks_late=False")


def test_a_node_that_exits_with_0_is_started_again(stack: Stack) -> None:
    worker = stack.nodes[0]
    # To a node that does not hear yet, a command is lost.
    wait_answers(stack)
    ended, ready = node_process(worker, "node1"), worker.process.count(READY_LINE)

    stack.client.control.shutdown(destination=[f"node1@{os.uname().nodename}"])

    worker.says(r"exited: node1 \(exit status 0; expected\)")
    replaced = lambda: node_process(worker, "node1") not in (0, ended)  # noqa: E731
    stack.harness.wait_until(replaced, TIMEOUT_SECONDS, "it has a new process")
    worker.ready(ready + 1)
    wait_answers(stack)


@pytest.mark.parametrize("module", ["broken", "broken_late"])
def test_a_node_that_cannot_start_ends_the_worker_with_a_code(broken: dict[str, Node], module: str) -> None:
    """At once, or only when it has run for longer than Supervisor waits."""
    worker = broken[module]

    assert worker.exits(TIMEOUT_SECONDS) == 1
    assert worker.process.count("RuntimeError: broken on purpose") >= 3
    assert worker.process.count("node0 could not be started") == 1
