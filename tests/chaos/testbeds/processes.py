"""A testbed of processes: one Redis, perhaps a proxy before it, two nodes and producers."""

import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import redis

from services.supervisor.proc_stat import read_stat
from tests.chaos.event_log import DIED, EXITED, FROZEN, Incident, Snapshot
from tests.chaos.redis_contents import find_started, find_tasks
from tests.chaos.subjects import STALK, Subject, settings
from tests.chaos.testbeds.base import GO_ON_SECONDS, NODES, PRODUCER_SECONDS, Plan, Testbed, Workload
from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.harness import Harness, Node
from tests.support.processes import Process, children
from tests.support.redis.proxy import Proxy
from tests.support.waiting import LOOK_SECONDS, GaveUp, T, wait_until

# A process that was told to stop does so within milliseconds.
STOP_SECONDS = 60
# Stock nodes get the seconds that the stack's containers have by default to stop: they sometimes wait for ever, which
# concerns their own columns alone.
STOCK_SECONDS = 20.0
# Tasks that may still wait when the next strike comes: less than the load of a second.
FEW = 20
# Tasks sent and not yet executed: half a minute of the load, as after the longest outage here.
BEHIND = 200
# That half minute of load is worked off in as long again.
SHORT_QUEUE_TIMES = 3
# Where all tasks wait.
QUEUE = "celery"


class NodeUnderTest(Node):
    """A node with its name, its subject, and what was done to it."""

    def __init__(self, harness: Harness, process: Process, environment: Mapping[str, str], subject: Subject, name: str):
        super().__init__(harness, process, environment)
        self.subject, self.name = subject, name
        # It was stopped or killed on purpose, so its end is no surprise.
        self.leaving = False
        self.frozen_since = 0.0
        self.frozen_snapshot: Snapshot | None = None

    @property
    def alive(self) -> bool:
        return self.process.alive


class ProcessTestbed(Testbed):
    """The processes of one run."""

    def __init__(self, harness: Harness, plan: Plan, proxied: bool = False) -> None:
        super().__init__(plan, harness.directory)
        self.harness, self.redis = harness, harness.redis()
        self.allowed_seconds = GO_ON_SECONDS if plan.subject == STALK else STOCK_SECONDS
        self.proxy = Proxy(self.redis.port) if proxied else None
        # Variables that the fault needs.
        self.more: dict[str, str] = {}
        self.nodes: list[NodeUnderTest] = []
        # The name that tests.chaos.workload.producer knows.
        self._pause = harness.directory / "pause"
        self._started = 0
        self._starting: list[NodeUnderTest] = []
        self._producers: list[Process] = []

    def close(self) -> None:
        if self.proxy:
            self.proxy.close()

    # Nodes.

    def environment(self) -> dict[str, str]:
        """Variables of a node or a producer, of either subject."""
        port = self.proxy.port if self.proxy else self.redis.port
        urls = {
            name: self.redis.url(database).replace(f":{self.redis.port}/", f":{port}/")
            for name, database in (("CELERY_BROKER_URL", 0), ("CELERY_RESULT_BACKEND", 1))
        }
        events = {"CHAOS_EVENTS": str(self.events.directory)}
        return self.harness.environment(**urls | events | settings(self.plan.pool, self.plan.lease) | self.more)

    def start_node(self, subject: Subject | None = None) -> NodeUnderTest:
        """Start one more node; it is perhaps not ready yet."""
        subject = subject or self.plan.subject
        self._started += 1
        # Each has its own name, which events carry.
        name = f"node{self._started}@{subject.name}"
        environment = self.environment()
        process = self.harness.python("node", subject.node(self.plan.pool, name), environment)
        node = NodeUnderTest(self.harness, process, environment, subject, name)
        self.nodes.append(node)
        return node

    def start_nodes(self, subjects: Sequence[Subject]) -> None:
        """Start nodes and wait until they are ready."""
        for node in [self.start_node(subject) for subject in subjects]:
            node.ready()

    def working_nodes(self) -> list[NodeUnderTest]:
        """Nodes that run and were not told to stop; frozen ones included."""
        return [node for node in self.nodes if node.alive and not node.leaving]

    def choose_busy_node(self) -> NodeUnderTest:
        """A node to strike: one that runs a task if there is one in time."""

        def busy() -> list[NodeUnderTest]:
            return [node for node in self.working_nodes() if self.events.running(node.name)]

        with suppress(GaveUp):
            return self.random.choice(self.wait(busy, self.plan.lease + self.allowed_seconds, "a node runs a task"))
        return self.random.choice(self.working_nodes())

    def kill(self, node: NodeUnderTest) -> None:
        """kill -9 of a node with all of its processes, as the kernel does it with a container."""
        node.leaving, since, snapshot = True, monotonic(), self.take_snapshot()
        node.process.end()
        self.incidents.append(Incident(DIED, since, monotonic(), node.name, snapshot=snapshot))
        assert not node.process.family(), f"{node.name} has survived"

    def freeze(self, node: NodeUnderTest) -> None:
        """Stop a node with all of its processes."""
        node.frozen_since, node.frozen_snapshot = monotonic(), self.take_snapshot()
        node.process.signal_family(signal.SIGSTOP)
        self.harness.wait_until(
            lambda: {state(pid) for pid in node.process.family()} <= {"T", "Z"}, STOP_SECONDS, f"{node.name} is frozen"
        )

    def thaw(self, node: NodeUnderTest) -> None:
        """Let it go on."""
        node.process.signal_family(signal.SIGCONT)
        if monotonic() - node.frozen_since >= self.plan.lease:
            since, snapshot = node.frozen_since, node.frozen_snapshot
            self.incidents.append(Incident(FROZEN, since, monotonic(), node.name, snapshot=snapshot))

    def replace(self, ready: bool = True) -> None:
        """Start as many nodes as are missing, as Supervisor and Docker do; wait for those that are not ready yet."""
        self._starting += [self.start_node() for _ in range(NODES - len(self.working_nodes()))]
        while ready and self._starting:
            node = self._starting.pop()
            if node.alive:
                node.ready()

    def replace_ended(self) -> None:
        """Record and replace nodes that ended by themselves; pause the producers while nodes are far behind."""
        for node in self.nodes:
            if not node.alive and not node.leaving:
                node.leaving = True
                self.exits.append(f"{node.name} exited with {node.process.code}")
                self.incidents.append(Incident(EXITED, monotonic() - LOOK_SECONDS, monotonic(), node.name))
        self.replace(ready=False)
        # On a busy machine nodes that are far behind would never catch up with the producers.
        if self.events.count("sent") - self.events.count("end") > BEHIND:
            self._pause.touch()
        else:
            self._pause.unlink(missing_ok=True)

    def choose_child(self) -> int:
        """A child of a prefork pool, one that runs a task if there is one."""

        def find() -> list[int]:
            # All may be gone for a moment, when they were struck one after the other.
            node = self.choose_busy_node()
            busy = {event.pid for event in self.events.running(node.name)}
            living = children(node.process.pid)
            return [pid for pid in living if pid in busy] or living

        return self.random.choice(self.wait(find, GO_ON_SECONDS, "a node has children"))

    def living_nodes(self) -> set[str]:
        """Names of the nodes that may be running tasks, those included that are shutting down."""
        return {node.name for node in self.nodes if node.alive}

    def describe(self) -> str:
        return self.harness.describe()

    # Sending.

    def new_label(self, word: str) -> str:
        """A label that no workload has had: what is sent at another strike are other tasks."""
        return f"{word}{len(self._producers)}"

    def send(self, workload: Workload) -> None:
        """Start a producer and wait until it has sent something."""
        self._wait_sent(workload, self._start_producer(workload))

    def _start_producer(self, workload: Workload) -> Process:
        workload = replace(workload, app=self.plan.subject.app)
        arguments = shlex.join(["-m", "tests.chaos.workload.producer", workload.to_json()])
        producer = self.harness.python("producer", arguments, self.environment())
        self._producers.append(producer)
        return producer

    def _wait_sent(self, workload: Workload, producer: Process) -> None:
        self.harness.wait_until(
            lambda: self.events.tasks_of("sent", workload.label) or not producer.alive,
            PRODUCER_SECONDS,
            f"{workload.label} is sent",
        )

    def load(self, kind: str, seconds: float, subjects: Sequence[Subject]) -> None:
        """Start nodes and keep sending tasks of that length, or chords; return when tasks end."""
        if not kind:
            self.start_nodes(subjects)
            return
        workload = self.plan_load("load", seconds, str(self.stop_file)) if kind == "tasks" else self._plan_chords()
        # The producer imports while the nodes do, and sends nothing before they are ready.
        self._pause.touch()
        producer = self._start_producer(workload)
        self.start_nodes(subjects)
        self._pause.unlink()
        self._wait_sent(workload, producer)
        self.wait_progress()

    def _plan_chords(self) -> Workload:
        """Small chords: 30 tasks a second, which is a third of the time of two solo nodes."""
        count = self.plan.count // 30
        return Workload("chord", header=5, chord_each=1, rate=5, count=count, until=str(self.stop_file))

    def stop_producers(self) -> None:
        """Tell the producers to stop, and wait until they have ended."""
        self.stop_file.touch()
        self.wait(lambda: not any(each.alive for each in self._producers), self.send_seconds, "all is sent")
        for producer in self._producers:
            assert producer.code == 0, producer.tail()

    # Waiting.

    def wait(self, condition: Callable[[], T | None], seconds: float, what: str) -> T:
        """Wait, and meanwhile replace nodes that end by themselves. Raises GaveUp."""

        def check() -> T | None:
            self.replace_ended()
            return condition()

        return wait_until(check, seconds, what, self.harness.describe)

    def wait_short_queue(self) -> None:
        """Wait until few tasks wait: after strike upon strike, a recovery would be the length of the queue.

        Nothing is sent meanwhile, or nodes that are slower than the load would never be done.
        """
        client, seconds = self.redis.client(), self.allowed_seconds * SHORT_QUEUE_TIMES

        def is_short() -> bool:
            self._pause.touch()
            return bool(client.llen(QUEUE) <= FEW)

        try:
            self.wait(is_short, seconds, "the queue is worked off")
        except GaveUp:
            self.remarks.append(f"{client.llen(QUEUE)} tasks waited after {seconds:g} s")

    # Redis.

    def take_snapshot(self) -> Snapshot:
        """What Redis has now: evidence, before a strike, of what a node had told it by then."""
        # Without decoding: messages are bytes.
        client = redis.Redis(port=self.redis.port, password=self.redis.password, socket_timeout=GO_ON_SECONDS)
        return Snapshot(frozenset(find_tasks(client)), frozenset(find_started(client)))

    def count_parked(self) -> int:
        """The number of dead letters."""
        return int(self.redis.client().zcard("dead_letters"))


def state(pid: int) -> str:
    """A process's state, as in /proc; Z when it is gone."""
    stat = read_stat(pid)
    return stat.state if stat else "Z"


@contextmanager
def open_testbed(directory: Path, plan: Plan, proxied: bool = False) -> Iterator[ProcessTestbed]:
    """A testbed in a new directory; whatever was started in it is gone afterwards."""
    checkout = Checkout(directory / "code", LIBRARIES_ONLY, packages=["tests/chaos"])
    with Harness(directory, checkout).opened() as harness, closing(ProcessTestbed(harness, plan, proxied)) as testbed:
        yield testbed
