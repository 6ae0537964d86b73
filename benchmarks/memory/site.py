"""The site of a benchmark: one Redis, one node with default settings, and producers."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import redis

from benchmarks.footprint import Reading, read
from benchmarks.memory.producer import HIGH, LOW
from benchmarks.memory.tasks import NOOP
from services.broker.keys import DEFAULT_QUEUE, UNACKED
from services.supervisor.heartbeat_file import READY
from tests.support.checkout import Checkout
from tests.support.harness import READY_SECONDS, Harness, Node, Stack
from tests.support.processes import Process
from tests.support.waiting import wait_until

# The smallest node in which tasks run beside each other; solo knows one only.
CONCURRENCY = {"prefork": 2, "threads": 2, "solo": 1}
# Tasks a second below which a run is given up: a tenth of what two busy cores do.
SLOWEST = 100
# For a start or an end, which takes no time by itself.
GRACE_SECONDS = 60
# A look at a run that takes minutes; each costs Redis a few commands.
LOOK_SECONDS = 0.5
# An ordinary task may have 5,000 before it in the queue.
ANSWER_SECONDS = GRACE_SECONDS + HIGH / SLOWEST


@dataclass
class Site:
    """A Redis and a node that is ready, with measurements of both."""

    stack: Stack
    node: Node
    producers: int
    broker: redis.Redis = field(init=False)
    results: redis.Redis = field(init=False)

    def __post_init__(self) -> None:
        self.broker, self.results = self.stack.redis.client(0), self.stack.redis.client(1)
        # Connected before anything is measured, because a connection costs Redis a buffer.
        self.results.ping()

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait, with a node that lives. Raises AssertionError, GaveUp among it."""

        def happened() -> object:
            assert self.node.process.alive, f"the node has ended before this: {what}\n{self.node.process.tail()}"
            return condition()

        wait_until(happened, seconds, what, self.stack.harness.describe, LOOK_SECONDS)

    def wait_executed(self, count: int, more: int) -> None:
        """Wait until `count` tasks have been executed, of which `more` are missing."""
        self.wait(lambda: self.executed() >= count, allow_seconds(more), f"{count:,} tasks are executed")

    # What there is.

    def used(self) -> int:
        """Bytes that Redis has in use."""
        return int(self._info("memory")["used_memory"])

    def executed(self) -> int:
        """Results stored so far: nothing but Celery's result backend sends SETEX, once a task (celery 5.7)."""
        return int(self._info("commandstats").get("cmdstat_setex", {"calls": 0})["calls"])

    def _info(self, section: str) -> dict[str, Any]:
        return self.broker.info(section)

    def keys(self) -> list[str]:
        """All keys of the broker's database."""
        return sorted(self.broker.scan_iter())

    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is held."""
        return not self.broker.llen(DEFAULT_QUEUE) and not self.broker.hlen(UNACKED)

    def reading(self) -> Reading:
        """The node's memory."""
        first = self.node.process.pid
        return read([first, *(pid for pid in self.node.process.family() if pid != first)])

    # What is done.

    @contextmanager
    def sending(self, count: int, countdown: float = 0) -> Iterator[None]:
        """Have so many tasks sent meanwhile; at the end all of them were, and the producers are gone."""
        shares = split(count, self.producers)
        options = f"--batch={(HIGH - LOW) // len(shares)} --countdown={countdown}"
        processes = [self._producer(f"--count={share} {options}") for share in shares]
        try:
            yield
            for process in processes:
                self.wait(partial(_has_ended, process), allow_seconds(count), "all is sent")
                assert process.code == 0, f"a producer has failed\n{process.tail()}"
        finally:
            for process in processes:
                process.end()

    def _producer(self, options: str) -> Process:
        return self.stack.harness.python(
            "producer", f"-m benchmarks.memory.producer {options}", self.stack.environment()
        )

    def ask(self) -> float:
        """Seconds from the publish of one task to its result. Raises celery.exceptions.TimeoutError."""
        began = monotonic()
        self.stack.send(NOOP).get(timeout=ANSWER_SECONDS)
        return monotonic() - began


def _has_ended(process: Process) -> bool:
    return not process.alive


def split(count: int, parts: int) -> list[int]:
    """`count` in at most so many parts of nearly the same size, none of them empty."""
    return [count // parts + (number < count % parts) for number in range(min(count, parts))]


def allow_seconds(count: int) -> float:
    """Seconds that so many tasks may take."""
    return GRACE_SECONDS + count / SLOWEST


@contextmanager
def open_site(pool: str, producers: int, **settings: str) -> Iterator[Site]:
    """A site in a directory of its own; what was started in it is gone afterwards."""
    own = {
        "CELERY_IMPORTS": "benchmarks.memory.tasks",
        "WORKER_POOL": pool,
        "WORKER_CONCURRENCY": str(CONCURRENCY[pool]),
        # At `info` a node writes a gigabyte about a million tasks.
        "LOG_LEVEL": "warning",
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        checkout = Checkout(Path(name) / "code", packages=("benchmarks", "tests/support"))
        with Harness(Path(name), checkout).opened() as harness:
            stack = harness.stack(**own, **settings)
            yield Site(stack, _node(stack), producers)


def _node(stack: Stack) -> Node:
    environment = stack.environment()
    process = stack.harness.python("node", "-m services.launch node --hostname=node0@benchmark", environment)
    node = Node(stack.harness, process, environment)

    def is_ready() -> bool:
        # Its log is silent about it at this level.
        assert process.alive, f"the node ended instead of getting ready\n{process.tail()}"
        return node.heartbeat().exists() and node.heartbeat().read_text().strip() == READY

    stack.harness.wait_until(is_ready, READY_SECONDS, "the node is ready")
    return node
