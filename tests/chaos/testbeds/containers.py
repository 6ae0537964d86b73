"""A testbed of the shipped containers: one stack, two worker containers."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.event_log import Snapshot
from tests.chaos.subjects import settings
from tests.chaos.testbeds.base import GO_ON_SECONDS, NODES, PRODUCER_SECONDS, Plan, Testbed
from tests.stack.containers.deployment import Stack, clone, one_at_a_time
from tests.support.processes import Process
from tests.support.waiting import T, wait_until

# Docker takes a while to say what there is, and a core.
LOOK_SECONDS = 0.2
# Tasks long enough that some run whenever a container is struck.
SECONDS = 0.05
OVERRIDE = """
x-chaos: &chaos
  volumes: ["./tests:/app/tests:ro", "./chaos:/chaos"]
services:
  worker:
    <<: *chaos
    environment: {worker}
  flower:
    <<: *chaos
    environment: {worker}
  beat:
    <<: *chaos
"""


class ContainerTestbed(Testbed):
    """A run in containers."""

    # Docker takes its time.
    allowed_seconds = GO_ON_SECONDS * 2

    def __init__(self, stack: Stack, plan: Plan, number: int) -> None:
        directory = shared_directory(stack)
        shutil.rmtree(directory / "events", ignore_errors=True)
        super().__init__(plan, directory)
        self.stop_file.unlink(missing_ok=True)
        # The run's number is part of task ids, which must not come again on the same Redis.
        self.stack, self.number = stack, number

    def wait(self, condition: Callable[[], T | None], seconds: float, what: str) -> T:
        return wait_until(condition, seconds, what, self.stack.describe, look=LOOK_SECONDS)

    def replace_ended(self) -> None:
        """Do nothing: Docker restarts containers that end by themselves."""

    def living_nodes(self) -> set[str]:
        """Names of the nodes that may be running tasks."""
        workers = [each for each in self.stack.containers() if each["Service"] == "worker"]
        return {node_name(each["ID"]) for each in workers if each["State"] == "running"}

    def take_snapshot(self) -> Snapshot:
        """What Redis has now: evidence, before a strike, of what a node had told it by then."""
        contents = self._redis_contents()
        return Snapshot(frozenset(contents["tasks"]), frozenset(contents["started"]))

    def count_parked(self) -> int:
        """The number of dead letters."""
        return int(self._redis_contents()["parked"])

    def _redis_contents(self) -> dict[str, Any]:
        done = self.stack.compose("exec", "-T", "flower", "python", "-m", "tests.chaos.redis_contents")
        return dict(json.loads(done.stdout))

    def describe(self) -> str:
        return self.stack.describe()

    def load(self) -> Process:
        """Start a producer; return it when tasks end."""
        workload = self.plan_load(f"run{self.number}", SECONDS, "/chaos/stop").to_json()
        module = "tests.chaos.workload.producer"
        command = ["docker", "compose", "exec", "-T", "flower", "python", "-m", module, workload]
        log = self.stack.directory / f"producer-{self.number}.log"
        process = Process("producer", command, self.stack.environment(), self.stack.directory, log)
        self.wait(lambda: self.events.count("sent") or not process.alive, PRODUCER_SECONDS, "tasks are sent")
        self.wait_progress()
        return process

    def choose_busy_worker(self) -> str:
        """The id of a worker container that runs a task."""

        def busy() -> list[str]:
            return [each for each in self.stack.ids("worker") if self.events.running(node_name(each))]

        return self.random.choice(self.wait(busy, self.plan.lease + self.allowed_seconds, "a worker runs a task"))

    def network(self) -> str:
        """The name of the network between workers and Redis."""
        return str(self.stack.network("broker-1")["Name"])


def shared_directory(stack: Stack) -> Path:
    """The directory that containers and tests both see."""
    return stack.directory / "chaos"


def node_name(container: str) -> str:
    """The name of the Celery node in a container."""
    return f"node0@{container[:12]}"


class ContainerStack:
    """The stack in which all runs take place, one after the other."""

    def __init__(self, directory: Path, lease: int) -> None:
        clone(directory)
        own = {"WORKERS": str(NODES), "BEAT_SCHEDULE": "report-free-space=off"}
        self.stack = Stack(directory, f"stalk-chaos-{os.getpid()}", **own)
        self.lease = lease
        self._pool = ""
        self._runs = 0
        shared_directory(self.stack).mkdir()
        # Containers write here as another user.
        shared_directory(self.stack).chmod(0o777)

    def start_run(self, plan: Plan) -> ContainerTestbed:
        """A testbed for this plan, with healthy workers of its pool; the lease is the stack's."""
        if plan.pool != self._pool:
            self._pool = plan.pool
            given = settings(plan.pool, self.lease)
            self.stack.settings.update(given)
            variables = json.dumps(given | {"CHAOS_EVENTS": "/chaos/events"})
            self.stack.override.write_text(OVERRIDE.replace("{worker}", variables))
            with one_at_a_time():
                self.stack.make("up")
        self.stack.wait_healthy()
        assert len(self.stack.ids("worker")) == NODES
        self._runs += 1
        return ContainerTestbed(self.stack, plan, self._runs)


@contextmanager
def open_container_stack(directory: Path, lease: int) -> Iterator[ContainerStack]:
    """A stack of its own, gone afterwards."""
    container_stack = ContainerStack(directory / "clone", lease)
    try:
        yield container_stack
    finally:
        container_stack.stack.override.unlink(missing_ok=True)
        container_stack.stack.make("clean", check=False, YES="1")
        container_stack.stack.remove()
