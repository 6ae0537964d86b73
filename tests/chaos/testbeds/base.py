"""What every testbed has: a plan, the event log, what was done to nodes, and the load of tasks."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tests.chaos.event_log import EventLog, Incident
from tests.chaos.subjects import CONCURRENCY, Subject
from tests.support.waiting import GaveUp, T

NODES = 2
# These bounds decide nothing: they are long enough for a machine that is busy with other work.
# Importing the app takes a second or two; then the first task is sent.
PRODUCER_SECONDS = 120
# Time for tasks to go on after a fault, beyond the lease: reconnecting takes a few seconds.
GO_ON_SECONDS = 60.0
# Tasks that end before a load counts as running.
MOVING = 10
# One in so many sends is a chord with so many tasks in its header: a sixth more to do, and in the shortest load of all
# some chords.
CHORD_EACH, HEADER = 25, 3
# The share of all nodes' time that the load takes: while one of two is always being replaced, the other one keeps up,
# so that a recovery is not the length of a queue.
LOAD = 0.3
POISON = "chaos.poison"


@dataclass(frozen=True)
class Plan:
    """One run: which fault strikes what, and how much is sent meanwhile."""

    fault: str
    pool: str
    subject: Subject
    lease: int
    # How often the fault strikes.
    times: int
    # Tasks that are sent at least, and how many a second.
    count: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Workload:
    """What a producer sends; see tests.chaos.workload.producer."""

    label: str
    task: str = "chaos.work"
    # Of the task: seconds, or for a poison the signal.
    argument: float = 0.01
    count: int = 1
    rate: float = 0.0
    countdown: float = 0.0
    # Tasks in a chord's header.
    header: int = 0
    # One in so many sends is a chord; 0: none.
    chord_each: int = 0
    # The file that stops it; none: it ends after `count`.
    until: str = ""
    app: str = ""

    def to_json(self) -> str:
        """The producer's argument."""
        # A chord's body takes as long as its header.
        return json.dumps(asdict(self) | {"planned": self.argument + self.countdown if self.task != POISON else 0})


class Testbed(ABC):
    """A running system under test, and what was done to it."""

    # How long the subject may take for what takes moments when all is well.
    allowed_seconds = GO_ON_SECONDS

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan, self.began, self.random = plan, monotonic(), random.Random(plan.seed)
        self.events = EventLog(directory / "events")
        # The file that stops producers.
        self.stop_file = directory / "stop"
        self.incidents: list[Incident] = []
        # Nodes that ended although nobody had told them to.
        self.exits: list[str] = []
        # Sentences for the table.
        self.remarks: list[str] = []
        # Tasks whose publish was behind the byte where Redis's file was torn.
        self.never_kept: set[str] = set()

    @abstractmethod
    def wait(self, condition: Callable[[], T | None], seconds: float, what: str) -> T:
        """Wait until the condition is true and return its value. Raises GaveUp."""

    def let_time_pass(self, seconds: float) -> None:
        """Wait: the length of an outage or of a freeze is what is tested."""
        end = monotonic() + seconds
        self.wait(lambda: monotonic() >= end, seconds + 1, "time passes")

    def wait_progress(self) -> None:
        """Wait until more tasks have ended; when they do not, the counts will show it."""
        before, seconds = self.events.count("end"), self.plan.lease + self.allowed_seconds
        try:
            self.wait(lambda: self.events.count("end") >= before + MOVING, seconds, "tasks go on")
        except GaveUp:
            self.remarks.append(f"nothing ended for {seconds:g} s")

    def wait_for_tasks(self, word: str, label: str, count: int, seconds: float) -> None:
        """Wait until so many tasks of a workload have such an event. Raises GaveUp."""
        self.wait(lambda: len(self.events.tasks_of(word, label)) >= count, seconds, f"{label}: {word} of {count} tasks")

    def plan_load(self, label: str, seconds: float, until: str) -> Workload:
        """Tasks of that length with chords among them, as many a second as the nodes can keep up with."""
        rate = min(self.plan.rate, LOAD * NODES * CONCURRENCY[self.plan.pool] / seconds)
        count = round(self.plan.count * rate / self.plan.rate)
        options: dict[str, Any] = {"header": HEADER, "chord_each": CHORD_EACH, "app": self.plan.subject.app}
        return Workload(label, argument=seconds, count=count, rate=rate, until=until, **options)

    @property
    def send_seconds(self) -> float:
        """How long a producer may take, outages and a busy machine included."""
        return self.plan.count / self.plan.rate * 20 + PRODUCER_SECONDS
