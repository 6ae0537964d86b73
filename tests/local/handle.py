"""A copy of this checkout and the stack that `make up` runs in it without Docker: what the tests hold in hands."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import redis
from celery import Celery

from config import load
from config.celery import build_celery_configuration
from config.environment import read_env_file
from config.redis_url import RedisUrl
from services.supervisor import rpc
from tests.stack.handle import clone
from tests.support.ports import free_port
from tests.support.waiting import wait_until

T = TypeVar("T")

HERE = Path(__file__).parent
ROOT_PYTHON = sys.executable
NO_DOCKER = "unix:///nowhere/docker.sock"
# Nothing runs by itself: tests count what runs.
SETTINGS = {
    "CELERY_IMPORTS": "own_probe",
    "WORKER_CONCURRENCY": "2",
    "BEAT_SCHEDULE": "report-free-space=off",
    "FLOWER_URL_PREFIX": "/flower",
}
# All are for a machine of two cores that is busy with much else; they cost nothing where things work.
MAKE_SECONDS = 600.0
WAIT_SECONDS = 300.0
ANSWER_SECONDS = 60
WARM_SHUTDOWN = "Warm shutdown"
SHOWN_LOG_LINES = 25
# As compose.yaml has them.
PROGRAMS = ("beat", "flower", "redis", "worker1-node0")


class Local:
    """A checkout of its own, with a home of its own."""

    def __init__(self, base: Path, name: str = "our checkout, 100% #1; 'really'", **settings: str) -> None:
        # The name has what shells, Supervisor's % and its comments could stumble over.
        self.directory = clone(base / name)
        self.home, self.scratch = base / "home", base / "tmp"
        self.home.mkdir()
        self.scratch.mkdir()
        self.port = free_port()
        self.settings = SETTINGS | settings
        self.env_file = self.directory / ".env"
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

    def command(self, target: str, **variables: str) -> list[str]:
        """`make target NAME=value`."""
        # The copy shares the checkout's .venv, and a test must not set about installing it anew.
        return ["make", "--old-file=.venv/ready", target, *(f"{name}={value}" for name, value in variables.items())]

    def make(
        self, target: str, check: bool = True, exported: Mapping[str, str] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it; `exported` are variables of the shell."""
        done = subprocess.run(
            self.command(target, **variables),
            cwd=self.directory,
            env=self.environment(**(exported or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MAKE_SECONDS,
            check=False,
        )
        if check:
            assert done.returncode == 0, (
                f"make {target}: {done.returncode}\n{done.stdout}{done.stderr}{self.describe()}"
            )
        return done

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

    def wait(self, condition: Callable[[], T], what: str, timeout: float = WAIT_SECONDS) -> T:
        """`condition()` once it is true; a wait in vain shows every program."""
        return wait_until(condition, timeout, what, context=self.describe)

    # ---- tasks

    def password(self) -> str:
        return read_env_file(self.env_file)["REDIS_PASSWORD"]

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
            socket_timeout=ANSWER_SECONDS,
        )

    def send(self, task: str, *arguments: Any, **options: Any) -> Sent:
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

    def start(self, label: str) -> Sent:
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
        before = self.told_to_stop()
        with ThreadPoolExecutor(1) as background:
            changing = background.submit(change)
            self.wait(lambda: self.told_to_stop() > before or changing.done(), "the node is told to stop")
            self.release(*labels)
            return changing.result()

    def told_to_stop(self) -> int:
        """How often a node of the first worker was told to stop."""
        return (self.state / "log" / "worker1-node0.log").read_text(errors="replace").count(WARM_SHUTDOWN)

    # ---- Flower

    def flower(self, path: str = "/flower/", login: str | None = None) -> int:
        """The HTTP status of a page; `login` is user:password, the right one by default, "" for none."""
        login = read_env_file(self.env_file)["FLOWER_BASIC_AUTH"] if login is None else login
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    # ---- files that a person edits

    def set_variable(self, file: Path, name: str, value: str) -> None:
        """Change a line of an env file, or add it."""
        text = file.read_text() if file.exists() else ""
        line = f"{name}={value}"
        changed, count = re.subn(rf"^#?{name}=.*$", lambda _: line, text, flags=re.MULTILINE)
        file.write_text(changed if count else f"{text}{line}\n")

    def replace(self, file: str, old: str, new: str) -> None:
        """Change a file; fails when what is to be changed is not there."""
        path = self.directory / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def write_task(self, name: str, text: str) -> Path:
        """A module in services/tasks/."""
        path = self.directory / "services" / "tasks" / f"{name}.py"
        path.write_text(text)
        return path

    def status(self) -> dict[str, Any]:
        """`make status JSON=1`."""
        return dict(json.loads(self.make("status", JSON="1").stdout))


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
