"""Where a fault strikes: one Redis, perhaps a proxy before it, two nodes and a producer."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TypeVar

import redis

from tests.chaos.census import tasks_in, told_in
from tests.chaos.marks import DIED, EXITED, FROZEN, Incident, Marks, Seen
from tests.chaos.subjects import CONCURRENCY, STALK, Subject, settings
from tests.support.checkout import ROOT, Checkout
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.processes import children
from tests.support.redis.proxy import Proxy
from tests.support.redis.server import RedisServer
from tests.support.waiting import LOOK_SECONDS, GaveUp, wait_until
from tests.support.world import Node, World

T = TypeVar("T")

NODES = 2
# These bounds decide nothing: what is waited for comes at once, or a machine that does much else brings it in time.
# Importing the app takes a second or two; then the first task is sent.
PRODUCER_SECONDS = 120
# Time for tasks to go on after a fault, beyond the lease: reconnecting takes a few seconds.
GO_ON_SECONDS = 60.0
# A process that was told to stop does so within milliseconds.
STOP_SECONDS = 60
# What waits for kombu's transport takes as many seconds of patience as the stack's containers have by default to stop:
# it waits for ever at times, and that is for its own columns alone.
STOCK_SECONDS = 20.0
# Of a load that has begun.
MOVING = 10
# Tasks that still wait when the next strike may come: less than the load of a second.
FEW = 20
# Sent and not yet executed: half a minute of the load, as after the longest silence here.
BEHIND = 200
# What the longest silence here leaves, half a minute of the load, is worked off in as long again.
PATIENCES = 3
# Of a load one in so many is a chord, with so many tasks in its header: a sixth more to do, and in the shortest load
# of all some chords.
CHORD_EACH, HEADER = 25, 3
# Of the time of all nodes that the load takes: where one of two is always being replaced, the other one keeps up, and
# a recovery is not the length of a queue.
LOAD = 0.3


@dataclass(frozen=True)
class Plan:
    """One run: what strikes whom, and how much is sent meanwhile."""

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
class Order:
    """What a producer sends; see tests.chaos.producer."""

    label: str
    task: str = "chaos.work"
    # Of the task: seconds, or for a poison the signal.
    argument: float = 0.01
    count: int = 1
    rate: float = 0.0
    countdown: float = 0.0
    # Tasks in a chord's header.
    header: int = 0
    # Of so many things that are sent one is a chord; 0: none.
    chord_each: int = 0
    # The file that ends it; none: it ends by itself.
    until: str = ""
    app: str = ""

    def text(self) -> str:
        # A chord's body takes as long as its header.
        return json.dumps(asdict(self) | {"planned": self.argument + self.countdown if self.task != POISON else 0})


POISON = "chaos.poison"
# Where all of it waits.
QUEUE = "celery"


@dataclass(eq=False)
class UnackedDeliveries:
    """A node, and what has become of it."""

    name: str
    node: Node
    subject: Subject
    # It was told to go, or killed: that it is gone is no surprise.
    leaving: bool = False
    frozen_since: float = 0.0
    frozen_with: Seen | None = None

    @property
    def alive(self) -> bool:
        return self.node.process.alive


@dataclass
class Arena:
    """The processes of one run, and what was done to them."""

    world: World
    plan: Plan
    proxied: bool = False
    # Variables that the fault needs.
    more: dict[str, str] = field(default_factory=dict)
    holders: list[UnackedDeliveries] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    # Nodes that ended although nobody had told them to.
    exits: list[str] = field(default_factory=list)
    # Sentences for the table.
    remarks: list[str] = field(default_factory=list)
    never_kept: set[str] = field(default_factory=set)
    began: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self.random = random.Random(self.plan.seed)
        self.marks = Marks(self.world.directory / "marks")
        self.redis: RedisServer = self.world.redis()
        self.proxy = Proxy(self.redis.port) if self.proxied else None
        # The names that tests.chaos.producer knows.
        self._enough, self._hold = self.world.directory / "enough", self.world.directory / "hold"
        self._started = 0
        self._starting: list[UnackedDeliveries] = []
        self._producers: list[Node] = []

    def close(self) -> None:
        if self.proxy:
            self.proxy.close()

    # Nodes.

    def environment(self) -> dict[str, str]:
        """Of a node or a producer, of either subject."""
        port = self.proxy.port if self.proxy else self.redis.port
        urls = {
            name: self.redis.url(database).replace(f":{self.redis.port}/", f":{port}/")
            for name, database in (("CELERY_BROKER_URL", 0), ("CELERY_RESULT_BACKEND", 1))
        }
        marks = {"CHAOS_MARKS": str(self.marks.directory)}
        return self.world.environment(**urls | marks | settings(self.plan.pool, self.plan.lease) | self.more)

    def start_node(self, subject: Subject | None = None) -> UnackedDeliveries:
        """One more node; it is perhaps not ready yet."""
        subject = subject or self.plan.subject
        self._started += 1
        # A name of its own for each, so that a mark tells which one it was.
        name = f"node{self._started}@{subject.name}"
        environment = self.environment()
        node = Node(self.world, self.world.python("node", subject.node(self.plan.pool, name), environment), environment)
        deliveries = UnackedDeliveries(name, node, subject)
        self.holders.append(deliveries)
        return deliveries

    def start_nodes(self, subjects: Sequence[Subject]) -> None:
        """Start nodes and wait until they are ready."""
        for deliveries in [self.start_node(subject) for subject in subjects]:
            deliveries.node.ready()

    def alive(self) -> list[UnackedDeliveries]:
        """Nodes that work, or would if they were not frozen."""
        return [deliveries for deliveries in self.holders if deliveries.alive and not deliveries.leaving]

    def some_node(self) -> UnackedDeliveries:
        """A node to strike."""
        return self.random.choice(self.alive())

    def busy_node(self) -> UnackedDeliveries:
        """A node to strike that runs a task."""

        def busy() -> list[UnackedDeliveries]:
            return [deliveries for deliveries in self.alive() if self.marks.running(deliveries.name)]

        with suppress(GaveUp):
            return self.random.choice(self.wait(busy, self.plan.lease + self.patience, "a node runs a task"))
        return self.some_node()

    def kill(self, deliveries: UnackedDeliveries) -> None:
        """kill -9 of a node with all of its processes, as the kernel does it with a container."""
        deliveries.leaving, since, seen = True, monotonic(), self.seen()
        deliveries.node.process.end()
        self.incidents.append(Incident(DIED, since, monotonic(), deliveries.name, seen=seen))
        assert not deliveries.node.process.family(), f"{deliveries.name} has survived"

    def signal_all(self, deliveries: UnackedDeliveries, number: signal.Signals) -> None:
        """Send a signal to every process of a node."""
        for pid in deliveries.node.process.family():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self, deliveries: UnackedDeliveries) -> None:
        """Stop a node with all of its processes."""
        deliveries.frozen_since, deliveries.frozen_with = monotonic(), self.seen()
        self.signal_all(deliveries, signal.SIGSTOP)
        self.world.wait_until(lambda: is_frozen(deliveries), STOP_SECONDS, f"{deliveries.name} is frozen")

    def thaw(self, deliveries: UnackedDeliveries) -> None:
        """Let it go on."""
        self.signal_all(deliveries, signal.SIGCONT)
        if monotonic() - deliveries.frozen_since >= self.plan.lease:
            since, seen = deliveries.frozen_since, deliveries.frozen_with
            self.incidents.append(Incident(FROZEN, since, monotonic(), deliveries.name, seen=seen))

    def replace(self, ready: bool = True) -> None:
        """Start as many nodes as are missing, as Supervisor and Docker do; wait for those that are not ready yet."""
        self._starting += [self.start_node() for _ in range(NODES - len(self.alive()))]
        while ready and self._starting:
            deliveries = self._starting.pop()
            if deliveries.alive:
                deliveries.node.ready()

    def tend(self) -> None:
        """Replace nodes that ended by themselves, and remember that they did."""
        for deliveries in self.holders:
            if not deliveries.alive and not deliveries.leaving:
                deliveries.leaving = True
                self.exits.append(f"{deliveries.name} exited with {deliveries.node.process.code}")
                self.incidents.append(Incident(EXITED, monotonic() - LOOK_SECONDS, monotonic(), deliveries.name))
        self.replace(ready=False)
        self.hold_up()

    def hold_up(self) -> None:
        """Let nothing be sent while nodes are far behind: on a busy machine they would never catch up."""
        if self.marks.count("sent") - self.marks.count("end") > BEHIND:
            self._hold.touch()
        else:
            self._hold.unlink(missing_ok=True)

    def some_child(self) -> int:
        """A child of a prefork pool."""

        def found() -> list[int]:
            # All may be gone for a moment, when they were struck one after the other.
            deliveries = self.busy_node()
            busy = [mark.pid for mark in self.marks.running(deliveries.name)]
            living = [pid for pid in children(deliveries.node.process.pid) if state(pid) != "Z"]
            return [pid for pid in living if pid in busy] or living

        return self.random.choice(self.wait(found, GO_ON_SECONDS, "a node has children"))

    def living(self) -> set[str]:
        """Names of the nodes that may have something at work, those included that are on their way out."""
        return {deliveries.name for deliveries in self.holders if deliveries.alive}

    def describe(self) -> str:
        return self.world.describe()

    # Sending.

    def new_label(self, word: str) -> str:
        """A label that no order has had: what is sent at another strike are other tasks."""
        return f"{word}{len(self._producers)}"

    def send(self, order: Order) -> None:
        """Start a producer and wait until it has sent something."""
        self._await_sent(order, self._start_producer(order))

    def _start_producer(self, order: Order) -> Node:
        order = replace(order, app=self.plan.subject.app)
        environment = self.environment()
        arguments = shlex.join(["-m", "tests.chaos.producer", order.text()])
        process = self.world.python("producer", arguments, environment)
        producer = Node(self.world, process, environment)
        self._producers.append(producer)
        return producer

    def _await_sent(self, order: Order, producer: Node) -> None:
        prefix = f"chaos-{order.label}-"
        self.world.wait_until(
            lambda: any(task.startswith(prefix) for task in self.marks.tasks("sent")) or not producer.process.alive,
            PRODUCER_SECONDS,
            f"{order.label} is sent",
        )

    def load(self, kind: str, seconds: float, nodes: Callable[[], None]) -> None:
        """Start `nodes`, and keep tasks of such a length coming until `enough`, or chords; return when all goes on."""
        if not kind:
            nodes()
            return
        order = self._tasks(seconds) if kind == "tasks" else self._chords()
        # The producer imports what it needs while the nodes do, and sends nothing before they are ready.
        self._hold.touch()
        producer = self._start_producer(order)
        nodes()
        self._hold.unlink()
        self._await_sent(order, producer)
        self.go_on()

    def _tasks(self, seconds: float) -> Order:
        """Tasks with chords among them."""
        rate = min(self.plan.rate, LOAD * NODES * CONCURRENCY[self.plan.pool] / seconds)
        count = round(self.plan.count * rate / self.plan.rate)
        order = Order("load", argument=seconds, count=count, rate=rate, until=str(self._enough))
        return replace(order, header=HEADER, chord_each=CHORD_EACH)

    def _chords(self) -> Order:
        """Small chords."""
        # 30 tasks a second: a third of the time of two solo nodes.
        count = self.plan.count // 30
        return Order("chord", header=5, chord_each=1, rate=5, count=count, until=str(self._enough))

    def enough(self) -> None:
        """Let the producers end, and wait for it."""
        self._enough.touch()
        for producer in self._producers:
            # Outages and a busy machine included.
            seconds = self.plan.count / self.plan.rate * 20 + PRODUCER_SECONDS
            self.wait(partial(has_ended, producer), seconds, "all is sent")
            assert producer.process.code == 0, producer.process.tail()

    # Waiting.

    @property
    def patience(self) -> float:
        """How long the subject may take, in seconds, for what takes moments when all is well."""
        return GO_ON_SECONDS if self.plan.subject == STALK else STOCK_SECONDS

    def wait(self, condition: Callable[[], T | None], seconds: float, what: str) -> T:
        """Wait, and meanwhile replace nodes that end by themselves."""

        def tended() -> T | None:
            self.tend()
            return condition()

        return wait_until(tended, seconds, what, self.world.describe)

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass: the length of an outage or of a freeze is what is tested."""
        end = monotonic() + seconds
        self.wait(lambda: monotonic() >= end, seconds + 1, "time passes")

    def go_on(self, more: int = MOVING) -> bool:
        """Wait until more tasks have ended; False when they do not, which the counts will show."""
        before, seconds = self.marks.count("end"), self.plan.lease + self.patience
        try:
            self.wait(lambda: self.marks.count("end") >= before + more, seconds, "tasks go on")
        except GaveUp:
            self.remarks.append(f"nothing ended for {seconds:g} s")
            return False
        return True

    def work_off(self) -> None:
        """Wait until few tasks wait: after strike upon strike, a recovery would be the length of the queue.

        Nothing is sent meanwhile, or nodes that are slower than the load would never be done.
        """
        seconds = self.patience * PATIENCES

        def few() -> bool:
            self._hold.touch()
            return bool(self.redis.client().llen(QUEUE) <= FEW)

        try:
            self.wait(few, seconds, "the queue is worked off")
        except GaveUp:
            self.remarks.append(f"{self.redis.client().llen(QUEUE)} tasks waited after {seconds:g} s")

    # Redis.

    def in_redis(self) -> set[str]:
        """The tasks whose message is anywhere in the broker's database, unless it is parked."""
        return tasks_in(self._client())

    def seen(self) -> Seen:
        """What Redis has now: evidence, before a strike, of what a node had told it by then."""
        client = self._client()
        return Seen(frozenset(tasks_in(client)), frozenset(told_in(client)))

    def _client(self) -> redis.Redis:
        """One that does not decode: messages are bytes."""
        return redis.Redis(port=self.redis.port, password=self.redis.password, socket_timeout=GO_ON_SECONDS)

    def parked(self) -> int:
        """Dead letters."""
        return int(self.redis.client().zcard("dead_letters"))


def is_frozen(deliveries: UnackedDeliveries) -> bool:
    """Whether each process of a node has been stopped."""
    return {state(pid) for pid in deliveries.node.process.family()} <= {"T", "Z"}


def has_ended(producer: Node) -> bool:
    return not producer.process.alive


def state(pid: int) -> str:
    """A process's state, as in /proc; Z when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@contextmanager
def opened(directory: Path, plan: Plan, proxied: bool = False) -> Iterator[Arena]:
    """An arena in a new directory; whatever was started in it is gone afterwards."""
    checkout = Checkout(directory / "code")
    checkout.fork_server = LIBRARIES_ONLY
    shutil.copytree(
        ROOT / "tests" / "chaos", checkout.path / "tests" / "chaos", ignore=shutil.ignore_patterns("test_*")
    )
    shutil.copy(ROOT / "tests" / "__init__.py", checkout.path / "tests")
    with World(directory, checkout).opened() as world:
        arena = Arena(world, plan, proxied)
        try:
            yield arena
        finally:
            arena.close()
