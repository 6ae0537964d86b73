"""Harness: the Redis servers, workers and beats that a test starts. It shows their logs, and ends them."""

import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from celery import Celery

from config import load
from config.celery import build_celery_configuration
from tests.support.checkout import PROBE, Checkout
from tests.support.fork_server import ForkServer
from tests.support.processes import Process, end_all
from tests.support.redis.server import RedisServer
from tests.support.waiting import T, holds_for, wait_until

PASSWORD = "correct-horse"
# Importing the application, connecting and looking for neighbours takes 3 s on an idle machine, and on a busy one
# forty times as long at most.
READY_SECONDS = 120
# A task starts within milliseconds, and later on a machine where a dozen processes start at the same time.
START_SECONDS = 120
READY_LINE = r"node\d+@\S+ ready\."


class Node:
    """A process of the stack with its environment."""

    def __init__(self, harness: "Harness", process: Process, environment: Mapping[str, str]) -> None:
        self.harness, self.process, self.environment = harness, process, environment

    def ready(self, nodes: int = 1) -> Self:
        """Wait until so many Celery nodes have logged that they are ready."""
        what = f"{self.process.name}: {nodes} nodes are ready"
        self.harness.wait_until(lambda: self._is_ready(nodes), READY_SECONDS, what)
        return self

    def says(self, pattern: str, timeout: float = READY_SECONDS, times: int = 1) -> Self:
        """Wait until its log has that many lines that match."""
        what = f"{self.process.name} says {pattern!r} {times} times"
        self.harness.wait_until(lambda: self.process.count(pattern) >= times, timeout, what)
        return self

    def exits(self, timeout: float) -> int:
        """Wait for its end; the exit code."""
        what = f"{self.process.name} exits"
        self.harness.wait_until(lambda: not self.process.alive, timeout, what)
        return self.process.wait(1)

    def heartbeat(self, name: str = "node0") -> Path:
        return Path(self.environment["STALK_RUN_DIR"]) / f"{name}.heartbeat"

    def _is_ready(self, nodes: int) -> bool:
        assert self.process.alive, f"it ended instead of getting ready\n{self.process.tail()}"
        return self.process.count(READY_LINE) >= nodes


class Stack:
    """Workers, beats and a client on one Redis."""

    def __init__(self, harness: "Harness", redis: RedisServer, settings: Mapping[str, str]) -> None:
        self.harness, self.redis, self._settings = harness, redis, settings
        self.client = harness.client(self.environment())
        self.nodes: list[Node] = []

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of one more container."""
        return self.harness.environment(**{**self._settings, **more})

    def worker(self, **more: str) -> Node:
        """Start a worker container's process, Supervisor with its nodes; it is perhaps not ready yet."""
        return self._node("worker", "-m services.launch worker", more)

    def beat(self, **more: str) -> Node:
        return self._node("beat", "-m services.launch beat", more)

    def celery(self, arguments: str, **more: str) -> Node:
        """`celery -A services.app ARGUMENTS`, as somebody runs it by hand."""
        return self._node("celery", f"-m celery -A services.app {arguments}", more)

    def command(self, arguments: str, **more: str) -> Node:
        """`python -m services ARGUMENTS`."""
        return self._node("command", f"-m services {arguments}", more)

    def python(self, arguments: str, **more: str) -> Node:
        """`python ARGUMENTS`: any program of the stack, or of somebody's own."""
        return self._node("python", arguments, more)

    def _node(self, name: str, arguments: str, more: Mapping[str, str]) -> Node:
        environment = self.environment(**more)
        node = Node(self.harness, self.harness.python(name, arguments, environment), environment)
        self.nodes.append(node)
        return node

    def send(self, task: str, *arguments: Any, **options: Any) -> Any:
        """Send a task by its name; its AsyncResult."""
        return self.client.send_task(task, arguments, **options)

    def waiting(self, queue: str = "celery") -> int:
        """Messages in a queue's list."""
        return int(self.redis.client().llen(queue))

    def unacked(self) -> int:
        """Messages that workers hold."""
        with self.redis.client().pipeline() as pipe:
            pipe.hlen("unacked")
            pipe.zcard("unacked_index")
            held, indexed = pipe.execute()
        assert held == indexed, f"{held} messages held, {indexed} with a claim time"
        return int(held)


class Harness:
    """The processes of one test, or of all tests of a module that share them."""

    # Open harnesses, for the report of a failed test.
    existing: list["Harness"] = []  # noqa: RUF012

    def __init__(self, directory: Path, checkout: Checkout) -> None:
        self.directory, self.checkout = directory, checkout
        self._processes: list[Process] = []
        self._apps: list[Celery] = []
        self._names: Counter[str] = Counter()

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Use this harness; everything that was started in it is ended afterwards."""
        Harness.existing.append(self)
        try:
            yield self
        finally:
            self.close()
            Harness.existing.remove(self)

    def close(self) -> None:
        try:
            for app in self._apps:
                forget_results(app)
                app.close()
        finally:
            end_all(self._processes)
            self._processes.clear()

    # Waiting.

    def wait_until(self, condition: Callable[[], T | None], timeout: float, what: str) -> T:
        """Like tests.support.waiting.wait_until, with this harness as the context."""
        return wait_until(condition, timeout, what, self.describe)

    def holds_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Like tests.support.waiting.holds_for, with this harness as the context."""
        holds_for(condition, seconds, what, self.describe)

    def describe(self) -> str:
        """State and last lines of every process."""
        return "\n".join(process.tail() for process in self._processes)

    # Starting.

    def path(self, name: str) -> Path:
        """A path in this harness's directory that is not used yet."""
        self._names[name] += 1
        return self.directory / f"{name}-{self._names[name]}"

    def redis(self, password: str = PASSWORD, lines: Iterable[str] = (), **options: Any) -> RedisServer:
        """A Redis server that runs, safe to be a broker unless `lines` say otherwise."""
        server = RedisServer(self.path("redis"), password=password, lines=lines, launch=self._launch, **options)
        return server.start()

    def process(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        directory: Path | None = None,
        fork_server: ForkServer | None = None,
    ) -> Process:
        """Any command, from the checkout's copy."""
        log, directory = self.path(name).with_suffix(".log"), directory or self.checkout.path
        return self._launch(log.stem, command, environment, directory, log, fork_server=fork_server)

    def python(
        self,
        name: str,
        arguments: str,
        environment: Mapping[str, str],
        directory: Path | None = None,
        fork_server: ForkServer | None = None,
    ) -> Process:
        """`python ARGUMENTS`, such as `-m services.launch beat`; forked by the checkout's fork server if it has one.

        A test about how a program starts, or becomes another, takes `process` and with it an interpreter of its own.
        """
        command = [sys.executable, *shlex.split(arguments)]
        return self.process(name, command, environment, directory, fork_server or self.checkout.fork_server)

    def answer(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout: float, checkout: Checkout | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` to its end; its exit code and output, as of subprocess.run."""
        checkout, command = checkout or self.checkout, [sys.executable, *arguments]
        base = self.path("answer")
        output, errors = base.with_suffix(".out"), base.with_suffix(".err")
        code = self._launch(
            base.name, command, environment, checkout.path, output, errors=errors, fork_server=checkout.fork_server
        ).wait(timeout)
        return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())

    def environment(self, **settings: str) -> dict[str, str]:
        """The environment of one container: none of this process's variables, and a run directory of its own."""
        run = self.path("run")
        run.mkdir()
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "LANG": "C.UTF-8",
            # As in the image.
            "PYTHONUNBUFFERED": "1",
            "STALK_RUN_DIR": str(run),
            "CELERY_IMPORTS": PROBE,
            "PROBE_LOG": str(self.directory / "probe.log"),
            "WORKER_CONCURRENCY": "1",
            **settings,
        }

    def _launch(self, *arguments: Any, **options: Any) -> Process:
        process = Process(*arguments, **options)
        self._processes.append(process)
        return process

    # The stack on one Redis.

    def stack(self, redis: RedisServer | None = None, /, **settings: str) -> Stack:
        """A stack on this server, or on a new one: broker in database 0, results in database 1."""
        redis = redis or self.redis()
        urls = {"CELERY_BROKER_URL": redis.url(0, password=""), "CELERY_RESULT_BACKEND": redis.url(1, password="")}
        return Stack(self, redis, {**urls, "REDIS_PASSWORD": redis.password, **settings})

    def client(self, environment: Mapping[str, str]) -> Celery:
        """A producer in this process that knows the settings and none of the tasks."""
        app = Celery("client", set_as_current=False)
        app.conf.update(build_celery_configuration(load(environment)))
        self._apps.append(app)
        return app

    # What the probe tasks recorded.

    def notes(self, word: str, label: str | None = None) -> list[tuple[str, int, float]]:
        """(label, pid, time) of every `start` or `end`."""
        path = self.directory / "probe.log"
        # A line that is being written may be seen by half.
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        found = [line.split() for line in lines]
        return [(of, int(pid), float(at)) for kind, of, pid, at in found if kind == word and label in (None, of)]

    def started(self, label: str) -> int:
        """How often the task with this label has started."""
        return len(self.notes("start", label))

    def wait_started(self, label: str) -> None:
        """Wait until the task with this label runs."""
        self.wait_until(lambda: self.started(label), START_SECONDS, f"the task {label} runs")

    def ended(self, label: str) -> int:
        """How often the task with this label has ended."""
        return len(self.notes("end", label))

    def release(self, *labels: str) -> None:
        """Let tasks end that wait to be released, as probe.hold does."""
        for label in labels:
            (self.directory / f"{label}.released").touch()


def forget_results(app: Celery) -> None:
    """Keep results from looking for their Redis when they are collected later, which takes 20 s (celery 5.7)."""
    consumer = app.backend.result_consumer
    consumer.stop()
    consumer.subscribed_to.clear()
    consumer._pubsub = None
