"""Measure one side of a pair: a Redis, a node, and its producers."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass

import click

from benchmarks.cost import starts
from benchmarks.cost.commands import Monitor, count_calls, count_from_outside
from benchmarks.cost.figures import COLD, Measurement, percentile, rate
from benchmarks.cost.proc import cpu_seconds
from benchmarks.footprint import MIB, read
from tests.chaos.subjects import Subject, settings
from tests.support.harness import Harness, Node
from tests.support.waiting import wait_until

# The default of WORKER_LEASE: tasks that do nothing are done before it matters.
LEASE = 60
# Tasks whose commands are counted one by one: enough that what happens each second does not show.
COUNTED = 1000
# The first sends of a producer open its connections.
WARM = 5
# Tasks a second, for timeouts. Stock prefork ran 50 on two cores that a dozen other processes were busy on.
SLOWEST = 20
# Starting a process and importing the application takes seconds; on a busy machine many of them.
MARGIN_SECONDS = 60
# Short beside the seconds that the first tenth of the tasks takes.
LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    pool: str
    # Tasks that fill the queue.
    tasks: int
    # Tasks that are sent one at a time.
    latencies: int
    # Tasks that a node holds for each that it can run.
    prefetch: int


@dataclass(frozen=True)
class Snapshot:
    """Counts at one moment; CPU in seconds."""

    started: int
    node_cpu: float
    redis_cpu: float
    commands: int


class Bench:
    """One Redis, one node and its producers."""

    def __init__(self, harness: Harness, subject: Subject, plan: Plan) -> None:
        self.harness, self.subject, self.plan = harness, subject, plan
        self.redis = harness.redis()
        self._client = self.redis.client()
        self.starts = harness.path("starts")
        self.starts.mkdir()

    def environment(self) -> dict[str, str]:
        """Variables of the node and of producers, on either side."""
        names = enumerate(("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"))
        # Twice what is sent, so that tasks that run twice are counted and do not fail.
        room = 2 * (self.plan.tasks + self.plan.latencies + WARM + COUNTED)
        own = {
            "CELERY_IMPORTS": "benchmarks.cost.tasks",
            "WORKER_PREFETCH_MULTIPLIER": str(self.plan.prefetch),
            "COST_STARTS": str(self.starts),
            "COST_ROOM": str(room),
        }
        urls = {name: self.redis.url(database) for database, name in names}
        return self.harness.environment(**settings(self.plan.pool, LEASE) | urls | own)

    def send(self, way: str, count: int) -> list[float]:
        """Run a producer to its end; see benchmarks.cost.producer."""
        path = self.harness.path("sent")
        command = f"-m benchmarks.cost.producer {self.subject.app} {way} {count} {path}"
        process = self.harness.python("producer", command, self.environment())
        self.harness.wait_until(lambda: not process.alive, count / SLOWEST + MARGIN_SECONDS, "all is sent")
        if process.code:
            raise click.ClickException(process.tail())
        times: list[float] = json.loads(path.read_text())
        return times

    def start_node(self) -> Node:
        """The node under test; it is perhaps not ready yet."""
        environment = self.environment()
        arguments = self.subject.node(self.plan.pool, f"node0@{self.subject.name}")
        return Node(self.harness, self.harness.python("node", arguments, environment), environment)

    def snapshot(self, node: Node) -> Snapshot:
        """Counts and CPU time so far."""
        started = starts.count(self.starts)
        cpu = cpu_seconds(node.process.family()), cpu_seconds([self.redis.process.pid])
        return Snapshot(started, *cpu, count_calls(self._client.info("commandstats")))

    def wait_started(self, node: Node, count: int) -> None:
        """Wait until so many tasks have started."""
        self._wait(node, lambda: starts.count(self.starts) >= count, f"{count} tasks have started")

    def wait_done(self, node: Node, count: int) -> None:
        """Wait until so many tasks have started and all are acknowledged.

        Raises click.ClickException when more have started.
        """
        self.wait_started(node, count)
        self._wait(node, lambda: self._client.type("unacked") == "none", "everything is acknowledged")
        if (found := starts.count(self.starts)) != count:
            raise click.ClickException(f"{self.subject.name}: {count} tasks were sent, {found} have started")

    def _wait(self, node: Node, condition: Callable[[], bool], what: str) -> None:
        seconds = self.plan.tasks / SLOWEST + MARGIN_SECONDS

        def over() -> bool:
            return condition() or not node.process.alive

        wait_until(over, seconds, what, self.harness.describe, LOOK_SECONDS)
        if not node.process.alive:
            raise click.ClickException(node.process.tail())


def measure(bench: Bench) -> Measurement:
    """Measure one side. Raises click.ClickException, or GaveUp when the node does not run the tasks in time."""
    plan = bench.plan
    published = rate(bench.send("fill", plan.tasks))
    node = bench.start_node()
    bench.wait_started(node, round(plan.tasks * COLD))
    first = bench.snapshot(node)
    bench.wait_done(node, plan.tasks)
    last = bench.snapshot(node)
    throughput = rate(starts.times(bench.starts))
    latencies = idle_latencies(bench, node)
    memory = read(node.process.family()).own / MIB
    tasks = last.started - first.started
    return Measurement(
        throughput=throughput,
        node_cpu=(last.node_cpu - first.node_cpu) / tasks * 1000,
        redis_cpu=(last.redis_cpu - first.redis_cpu) / tasks * 1000,
        calls=calls_per_task(bench, node),
        commands=(last.commands - first.commands) / tasks,
        latency_median=percentile(latencies, 50),
        latency_99=percentile(latencies, 99),
        memory=memory,
        publish=published,
    )


def idle_latencies(bench: Bench, node: Node) -> list[float]:
    """Milliseconds from before apply_async to the start of tasks that come one at a time."""
    before = starts.count(bench.starts)
    count = bench.plan.latencies + WARM
    sent = bench.send("single", count)
    bench.wait_done(node, before + count)
    pairs = zip(sent, starts.times(bench.starts)[before:], strict=True)
    return [(start - publish) * 1000 for publish, start in pairs][WARM:]


def calls_per_task(bench: Bench, node: Node) -> float:
    """Commands over connections for each task of a queue that was filled while the node stood still."""
    before = starts.count(bench.starts)
    node.process.signal_family(signal.SIGSTOP)
    bench.send("fill", COUNTED)
    monitor = Monitor(bench.redis)
    node.process.signal_family(signal.SIGCONT)
    bench.wait_done(node, before + COUNTED)
    return count_from_outside(monitor.close()) / COUNTED
