"""A copy of this checkout and the stack that `make up` runs in it without Docker: what the tests hold in hands."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import redis
from celery import Celery

from config import load
from config.celery import build_celery_configuration
from config.redis_url import RedisUrl
from services.supervisor import rpc
from tests.stack.containers.deployment import clone
from tests.stack.deployment import PAGE_SECONDS, SHOWN_LOG_LINES, WARM_SHUTDOWN, Deployment

T = TypeVar("T")

ROOT_PYTHON = sys.executable
NO_DOCKER = "unix:///nowhere/docker.sock"
# Nothing runs by itself: tests count what runs.
SETTINGS = {
    "CELERY_IMPORTS": "own_probe",
    "WORKER_CONCURRENCY": "2",
    "BEAT_SCHEDULE": "report-free-space=off",
    "FLOWER_URL_PREFIX": "/flower",
}
# As compose.yaml has them.
PROGRAMS = ("beat", "flower", "redis", "worker1-node0")


class Local(Deployment):
    """A checkout of its own, with a home of its own."""

    def __init__(self, base: Path, name: str = "our checkout, 100% #1; 'really'", **settings: str) -> None:
        # The name has what shells, Supervisor's % and its comments could stumble over.
        super().__init__(clone(base / name), SETTINGS | settings)
        self.home, self.scratch = base / "home", base / "tmp"
        self.home.mkdir()
        self.scratch.mkdir()
        self.tasks_file = self.directory / ".env.tasks"
        self.state = self.directory / ".stalk"
        self.run = self.state / "run"
        self.path = os.environ["PATH"]

    # ---- commands, as a person types them

    def environment(self, **variables: str) -> dict[str, str]:
        """That of a shell on a host without Docker."""
        return {
            "PATH": self.path,
            "HOME": str(self.home),
            "TMPDIR": str(self.scratch),
            "LANG": "C.UTF-8",
            "DOCKER_HOST": NO_DOCKER,
            "FLOWER_PORT": str(self.port),
            # A task must not see it: in a container it would not.
            "ONLY_IN_THE_SHELL": "1",
            **self.settings,
            **variables,
        }

    # ---- Supervisor's view

    def processes(self) -> dict[str, dict[str, Any]]:
        """Every process that Supervisor knows, by its name; {} when there is no Supervisor."""
        try:
            known = rpc.connect(self.run / "supervisor.sock").getAllProcessInfo()
        except rpc.ERRORS:
            return {}
        return {process["name"]: process for process in known}

    def pids(self) -> dict[str, int]:
        """The process id of each program."""
        return {name: process["pid"] for name, process in self.processes().items()}

    def units(self) -> dict[str, str]:
        return {name: str(pid) for name, pid in self.pids().items()}

    def kill_node(self) -> None:
        before = self.pids()["worker1-node0"]
        os.killpg(before, signal.SIGKILL)
        self.wait(lambda: self.pids()["worker1-node0"] not in (0, before), "another node")

    def readable(self) -> dict[str, str]:
        shown = {f"process {number}": line for number, line in enumerate(self.left())}
        for path in self.state.rglob("*"):
            # Flower writes by another name, which is gone in a moment.
            with suppress(FileNotFoundError):
                if path.is_file() and path != self.run / "environment.json":
                    shown[str(path)] = path.read_bytes().decode(errors="replace")
        return shown

    def supervisor(self) -> int:
        """The process id of Supervisor."""
        return int((self.run / "supervisord.pid").read_text())

    def left(self) -> list[str]:
        """Every process that has anything to do with this checkout, as `ps` would show it."""
        found = []
        wanted = str(self.directory).encode()
        for process in Path("/proc").glob("[0-9]*"):
            # Redis writes its title over its environment, and has its data as its directory.
            with suppress(OSError):
                told = [(process / name).read_bytes() for name in ("cmdline", "environ")]
                told.append(bytes((process / "cwd").readlink()))
                if any(wanted in text for text in told) and int(process.name) != os.getpid():
                    found.append(f"{process.name} {told[0].replace(bytes(1), b' ').decode(errors='replace')}")
        return found

    def redis_servers(self) -> int:
        """How many servers run on this checkout's data; two would ruin it."""
        return sum(bool(re.search("(redis|valkey)-server", process)) for process in self.left())

    def describe(self) -> str:
        """Every program's state and last log lines, for somebody who asks why a test failed."""
        parts = [
            f"{name}: {process['statename']} {process['description']}" for name, process in self.processes().items()
        ]
        for log in sorted((self.state / "log").glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
            parts += [f"--- {log.name}", *lines]
        return "\n".join(parts)

    # ---- tasks

    def password(self) -> str:
        return self.env_value("REDIS_PASSWORD")

    def url(self, database: int) -> str:
        """The Redis URL of this stack's database, as the host reaches it."""
        return RedisUrl(
            "redis+socket", database, socket_path=str(self.run / "redis.sock"), password=self.password()
        ).text()

    def redis(self, database: int = 0) -> redis.Redis:
        """A client of the stack's Redis."""
        return redis.Redis(
            unix_socket_path=str(self.run / "redis.sock"),
            password=self.password(),
            db=database,
            decode_responses=True,
            socket_timeout=PAGE_SECONDS,
        )

    def send(self, task: str, *arguments: Any, **options: Any) -> "Sent":
        """Send a task by its name."""
        app = Celery("client", set_as_current=False)
        # A client that never looks for results holds no connection when Redis is stopped.
        app.conf.update(build_celery_configuration(load({"CELERY_BROKER_URL": self.url(0)})), result_backend="disabled")
        sent = app.send_task(task, arguments, **options)
        app.close()
        return Sent(self, str(sent.id))

    def run_task(self, task: str, *arguments: Any) -> Any:
        """What a task returns."""
        return self.send(task, *arguments).get()

    def notes(self, word: str, label: str) -> int:
        """How often a task of own_probe.py has written down its start or its end."""
        try:
            lines = (self.directory / "probe.log").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return sum(line.split()[:2] == [word, label] for line in lines)

    def start(self, label: str) -> "Sent":
        """Send a task that runs until `release`, and return once it runs."""
        sent = self.send("own_probe.hold", label)
        self.wait(lambda: self.notes("start", label), f"task {label} runs")
        return sent

    def release(self, *labels: str) -> None:
        """Let these tasks end."""
        for label in labels:
            (self.directory / f"{label}.released").touch()

    def end_while(self, change: Callable[[], T], *labels: str) -> T:
        """Begin a change, and let these tasks end once their node was told to stop; what the change returned."""
        return self.while_stopping(change, lambda: self.release(*labels))

    def shutdowns(self) -> int:
        return (self.state / "log" / "worker1-node0.log").read_text(errors="replace").count(WARM_SHUTDOWN)

    # ---- Flower

    def login(self) -> str:
        return self.env_value("FLOWER_BASIC_AUTH")


class Sent:
    """A task that was sent."""

    def __init__(self, local: Local, identifier: str) -> None:
        self.local, self.id = local, identifier

    def get(self) -> Any:
        """What it returned, once it has."""
        return self.local.wait(self._result, f"task {self.id} has ended")[0]

    def _result(self) -> list[Any]:
        with self.local.redis(database=1) as client:
            kept = client.get(f"celery-task-meta-{self.id}")
        answer = json.loads(str(kept)) if kept else {}
        assert answer.get("status") in (None, "SUCCESS"), answer
        return [answer["result"]] if answer else []


def kill(pid: int) -> None:
    """Kill a process that may have gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
