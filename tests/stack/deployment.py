"""What every test does with a stack, whichever runtime it runs in: make, call, Flower, files, waits."""

import base64
import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from config.environment import read_env_file
from tests.support.ports import free_port
from tests.support.waiting import wait_until

T = TypeVar("T")

# What a node logs when it is told to stop.
WARM_SHUTDOWN = "Warm shutdown"
# All are for a machine of two cores that is busy with much else; they cost nothing where things work.
MAKE_SECONDS = 900.0
TIMEOUT_SECONDS = 300.0
PAGE_SECONDS = 60.0
SHOWN_LOG_LINES = 25


def run(
    command: Sequence[str], directory: Path, variables: Mapping[str, str], timeout: float, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed."""
    return subprocess.run(
        command,
        cwd=directory,
        env=dict(variables),
        capture_output=True,
        text=True,
        input=given,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class Answer:
    """Flower's response; status 0 when nothing responds."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Deployment:
    """A stack in a directory of its own, with a port of its own; each runtime has a subclass."""

    # Between two looks; a look at containers costs more than one at processes.
    look_seconds = 0.05

    def __init__(self, directory: Path, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.port = free_port()
        self.settings = dict(settings)
        self.env_file = directory / ".env"

    # ---- what each runtime does in its own way

    def environment(self, **variables: str) -> dict[str, str]:
        """The variables of the shell in which commands run."""
        raise NotImplementedError

    def describe(self) -> str:
        """The state and last log lines of everything that runs, for the message of a failed test."""
        raise NotImplementedError

    def units(self) -> dict[str, str]:
        """The container or process id of each unit, by its name in `make status`."""
        raise NotImplementedError

    def readable(self) -> dict[str, str]:
        """All that others than the owner could read of what runs, by its place: process lists, logs, files."""
        raise NotImplementedError

    def login(self) -> str:
        """Flower's user:password."""
        raise NotImplementedError

    def kill_node(self) -> None:
        """Kill the first worker's node with SIGKILL, and return once another process has its place."""
        raise NotImplementedError

    def shutdowns(self) -> int:
        """How often a worker's node was told to stop."""
        raise NotImplementedError

    # ---- commands, as a person types them

    def command(self, target: str, **variables: str) -> list[str]:
        """`make target NAME=value`."""
        # The copy shares the checkout's .venv, and a test must not install it anew.
        return ["make", "--old-file=.venv/ready", target, *(f"{name}={value}" for name, value in variables.items())]

    def make(
        self,
        target: str,
        check: bool = True,
        exported: Mapping[str, str] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `make target NAME=value`; `exported` are variables of the shell."""
        command, environment = self.command(target, **variables), self.environment(**(exported or {}))
        done = run(command, self.directory, environment, MAKE_SECONDS)
        return self.checked(done) if check else done

    def checked(self, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
        """Fail when a command has failed, with all that it printed and what runs."""
        command = " ".join(done.args)
        assert done.returncode == 0, (
            f"'{command}' exited with {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.describe()}"
        )
        return done

    def status(self) -> dict[str, Any]:
        """`make status JSON=1`."""
        return dict(json.loads(self.make("status", JSON="1").stdout))

    def add(self) -> int:
        """The sum of 4 and 3, added by a worker."""
        done = self.make("call", TASK="services.tasks.arithmetic.add", ARGS="[4, 3]")
        return int(json.loads(done.stdout)["result"])

    def wait(self, condition: Callable[[], T | None], what: str, timeout: float = TIMEOUT_SECONDS) -> T:
        """`condition()` once it is true; fail after `timeout` seconds with the state of the stack."""
        return wait_until(condition, timeout, what, context=self.describe, look=self.look_seconds)

    def while_stopping(self, change: Callable[[], T], release: Callable[[], object]) -> T:
        """Begin a change, call `release` once a node was told to stop; what the change returned."""
        before = self.shutdowns()
        with ThreadPoolExecutor(1) as background:
            changing = background.submit(change)
            self.wait(lambda: self.shutdowns() > before or changing.done(), "the node is told to stop")
            told = self.shutdowns() > before
            release()
            result = changing.result()
        assert told, f"the change ended and no node was told to stop\n{self.describe()}"
        return result

    # ---- Flower

    def flower(self, path: str = "/flower/", login: str | None = None) -> Answer:
        """GET a page of Flower; `login` is user:password, "" for none, the right one by default."""
        login = self.login() if login is None else login
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=PAGE_SECONDS) as response:
                return Answer(response.status, response.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())
        except OSError as error:
            return Answer(0, str(error))

    # ---- files that a person edits

    def env_value(self, name: str) -> str:
        """The value of a variable in .env."""
        return read_env_file(self.env_file)[name]

    def set_variable(self, file: Path, name: str, value: str) -> None:
        """Change a line of an env file, or add it."""
        text = file.read_text() if file.exists() else ""
        line = f"{name}={value}"
        changed, count = re.subn(rf"^#?{name}=.*$", lambda _: line, text, flags=re.MULTILINE)
        file.write_text(changed if count else f"{text}{line}\n")

    def replace(self, file: str, old: str, new: str) -> None:
        """Change a file; fail when what is to be changed is not there."""
        path = self.directory / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def write_task(self, name: str, text: str) -> Path:
        """A module in services/tasks/."""
        path = self.directory / "services" / "tasks" / f"{name}.py"
        path.write_text(text)
        return path
