"""Faults of the shipped containers: one stack, two worker containers, and what Docker can do to them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

from tests.chaos.arena import CHORD_EACH, GO_ON_SECONDS, HEADER, LOAD, MOVING, NODES, PRODUCER_SECONDS, Order, Plan
from tests.chaos.faults import LONGER
from tests.chaos.marks import CUT_OFF, DIED, Incident, Marks, Seen
from tests.chaos.run import Outcome, counted, settle
from tests.chaos.subjects import CONCURRENCY, settings
from tests.stack.handle import Stack, clone, one_at_a_time
from tests.support.processes import Process
from tests.support.waiting import GaveUp

# Tasks long enough that some run whenever a container is struck.
SECONDS = 0.05
# 128 and the signal's number.
KILLED = 137
# A container that was struck is found out about and connected again within a few seconds.
RECONNECT_SECONDS = 10.0
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


@dataclass
class Fleet:
    """A run in containers."""

    stack: Stack
    plan: Plan
    # Ids of tasks must not come again on the same Redis.
    number: int
    incidents: list[Incident] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    never_kept: set[str] = field(default_factory=set)
    began: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self.random = random.Random(self.plan.seed)
        shutil.rmtree(shared(self.stack) / "marks", ignore_errors=True)
        self.enough.unlink(missing_ok=True)
        self.marks = Marks(shared(self.stack) / "marks")

    @property
    def enough(self) -> Path:
        """The file that ends the producer."""
        return shared(self.stack) / "enough"

    # What a run asks of it.

    def tend(self) -> None:
        """Docker starts again what ends by itself."""

    def living(self) -> set[str]:
        running = [each for each in self.stack.containers() if each["Service"] == "worker"]
        return {node(each["ID"]) for each in running if each["State"] == "running"}

    def in_redis(self) -> set[str]:
        return set(self._census()["tasks"])

    def parked(self) -> int:
        return int(self._census()["parked"])

    def seen(self) -> Seen:
        """What Redis has now: evidence of what a node had told it."""
        census = self._census()
        return Seen(frozenset(census["tasks"]), frozenset(census["told"]))

    def _census(self) -> dict[str, Any]:
        done = self.stack.compose("exec", "-T", "flower", "python", "-m", "tests.chaos.census")
        return dict(json.loads(done.stdout))

    def describe(self) -> str:
        return self.stack.describe()

    # What a fault asks of it.

    def load(self) -> Process:
        """Keep tasks coming; return when they are under way."""
        rate = min(self.plan.rate, LOAD * NODES * CONCURRENCY[self.plan.pool] / SECONDS)
        count = round(self.plan.count * rate / self.plan.rate)
        order = Order(f"run{self.number}", argument=SECONDS, count=count, rate=rate, until="/chaos/enough")
        order = replace(order, app=self.plan.subject.app, header=HEADER, chord_each=CHORD_EACH)
        command = ["docker", "compose", "exec", "-T", "flower", "python", "-m", "tests.chaos.producer", order.text()]
        log = self.stack.directory / f"producer-{self.number}.log"
        process = Process("producer", command, self.stack.environment(), self.stack.directory, log)
        self.stack.wait(lambda: self.marks.count("sent") or not process.alive, "tasks are sent", PRODUCER_SECONDS)
        self.go_on()
        return process

    def go_on(self) -> None:
        """Wait until more tasks have ended; that they do not, the counts will show."""
        before, seconds = self.marks.count("end"), self.plan.lease + GO_ON_SECONDS * 2
        with suppress(GaveUp):
            self.stack.wait(lambda: self.marks.count("end") >= before + MOVING, "tasks go on", seconds)
            return
        self.remarks.append(f"nothing ended for {seconds:g} s")

    def hold(self) -> None:
        """Let more than a lease pass."""
        end = monotonic() + self.plan.lease * LONGER
        self.stack.wait(lambda: monotonic() >= end, "a lease has passed", self.plan.lease * LONGER + 1)

    def busy_worker(self) -> str:
        """The id of a worker container that runs a task."""

        def busy() -> list[str]:
            return [each for each in self.stack.ids("worker") if self.marks.running(node(each))]

        return self.random.choice(self.stack.wait(busy, "a worker runs a task", self.plan.lease + GO_ON_SECONDS))

    def network(self) -> str:
        return str(self.stack.network("broker-1")["Name"])


def shared(stack: Stack) -> Path:
    """What containers and tests both see."""
    return stack.directory / "chaos"


def node(identifier: str) -> str:
    """The name of the Celery node in a container."""
    return f"node0@{identifier[:12]}"


# The faults.

Strike = Callable[[Fleet], None]
FAULTS: dict[str, Strike] = {}


def fault(strike: Strike) -> Strike:
    FAULTS[strike.__name__] = strike
    return strike


@fault
def container_redis_kill(fleet: Fleet) -> None:
    """Redis's container killed and started again."""
    fleet.stack.docker("start", fleet.stack.kill_redis())
    fleet.stack.wait_healthy("redis")


@fault
def container_worker_kill(fleet: Fleet) -> None:
    """docker kill of a worker's container, and its start."""
    worker, since = fleet.busy_worker(), monotonic()
    # Not before: what came and ended in between would be missing in it as if it had been acknowledged.
    seen = fleet.seen()
    fleet.stack.docker("kill", worker)
    fleet.incidents.append(Incident(DIED, since, monotonic(), node(worker), seen=seen))
    assert fleet.stack.inspect(worker)["State"]["ExitCode"] == KILLED
    fleet.stack.docker("start", worker)
    fleet.stack.wait_healthy("worker")


@fault
def container_worker_disconnect(fleet: Fleet) -> None:
    """A worker's container off the network for longer than its lease."""
    worker, network = fleet.busy_worker(), fleet.network()
    since, seen = monotonic(), fleet.seen()
    fleet.stack.docker("network", "disconnect", network, worker)
    assert network not in fleet.stack.inspect(worker)["NetworkSettings"]["Networks"]
    fleet.hold()
    fleet.stack.docker("network", "connect", network, worker)
    fleet.incidents.append(Incident(CUT_OFF, since, monotonic() + RECONNECT_SECONDS, node(worker), seen=seen))


@fault
def container_redis_disconnect(fleet: Fleet) -> None:
    """Redis's container off the network for longer than a lease."""
    (redis,), network = fleet.stack.ids("redis"), fleet.network()
    fleet.stack.docker("network", "disconnect", network, redis)
    assert not fleet.stack.inspect(redis)["NetworkSettings"]["Networks"]
    fleet.hold()
    fleet.stack.docker("network", "connect", "--alias", "redis", network, redis)


@fault
def container_worker_stop(fleet: Fleet) -> None:
    """docker stop of a worker's container under load, and its start."""
    worker = fleet.busy_worker()
    fleet.stack.docker("stop", worker)
    assert fleet.stack.inspect(worker)["State"]["ExitCode"] == 0
    fleet.stack.docker("start", worker)
    fleet.stack.wait_healthy("worker")


@fault
def container_scale_down(fleet: Fleet) -> None:
    """make scale to one worker under load, and back to two."""
    fleet.stack.make("scale", WORKERS="1")
    assert len(fleet.stack.ids("worker")) == 1
    fleet.go_on()
    fleet.stack.make("scale", WORKERS=str(NODES))


@cache
def about(name: str) -> str:
    """What a fault does, in a line."""
    return str(FAULTS[name].__doc__).partition("\n")[0].rstrip(".")


# The stack and its runs.


class Harbour:
    """The stack in which all runs take place, one after the other."""

    def __init__(self, directory: Path, lease: int) -> None:
        clone(directory)
        own = {"WORKERS": str(NODES), "BEAT_SCHEDULE": "report-free-space=off"}
        self.stack = Stack(directory, f"stalk-chaos-{os.getpid()}", **own)
        self.lease = lease
        self._pool = ""
        self._runs = 0
        shared(self.stack).mkdir()
        # Containers write here as another user.
        shared(self.stack).chmod(0o777)

    def use(self, pool: str) -> None:
        """Have the workers run this pool, and everything healthy."""
        if pool != self._pool:
            self._change_to(pool)
        self._pool = pool
        self.stack.wait_healthy()
        assert len(self.stack.ids("worker")) == NODES

    def _change_to(self, pool: str) -> None:
        given = settings(pool, self.lease) | {"CHAOS_MARKS": "/chaos/marks"}
        self.stack.settings.update(settings(pool, self.lease))
        self.stack.override.write_text(OVERRIDE.replace("{worker}", json.dumps(given)))
        with one_at_a_time():
            self.stack.make("up")

    def run(self, plan: Plan) -> Outcome:
        """Carry a plan out; the lease is the stack's."""
        self.use(plan.pool)
        self._runs += 1
        fleet = Fleet(self.stack, plan, self._runs)
        producer = fleet.load()
        try:
            strike(fleet, producer)
        except AssertionError as error:
            return replace(counted(fleet), breaches=[str(error).partition("\n")[0]], story=str(error))
        finally:
            producer.end()
        settle(fleet)
        return counted(fleet)


def strike(fleet: Fleet, producer: Process) -> None:
    """Let the fault strike as often as planned, and wait until all is sent."""
    for _ in range(fleet.plan.times):
        FAULTS[fleet.plan.fault](fleet)
        fleet.go_on()
    fleet.enough.touch()
    # Outages included, in which a producer waits too.
    seconds = PRODUCER_SECONDS + fleet.plan.count / fleet.plan.rate * 20
    fleet.stack.wait(lambda: not producer.alive, "all is sent", seconds)
    assert producer.code == 0, producer.tail()


@contextmanager
def opened(directory: Path, lease: int) -> Iterator[Harbour]:
    """A stack of its own, gone afterwards."""
    harbour = Harbour(directory / "clone", lease)
    try:
        yield harbour
    finally:
        harbour.stack.override.unlink(missing_ok=True)
        harbour.stack.make("clean", check=False, YES="1")
        harbour.stack.remove()
