"""A clone of this checkout and the stack that `make up` starts in it: what the tests hold in their hands."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from services.broker.keys import DEAD_LETTERS_UNTOLD
from tests.stack.deployment import MAKE_SECONDS, SHOWN_LOG_LINES, TIMEOUT_SECONDS, WARM_SHUTDOWN, Deployment, run

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]
SERVICES = ("redis", "worker", "beat", "flower")
# What a program needs to find its way on this machine; everything else of the caller's environment stays out.
PASSED_ON = ("PATH", "HOME", "TMPDIR", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "DOCKER_CERT_PATH",
             "DOCKER_TLS_VERIFY", "XDG_RUNTIME_DIR", "SSL_CERT_FILE", "PIP_INDEX_URL", "UV_INDEX_URL",
             "UV_DEFAULT_INDEX", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
             "no_proxy")  # fmt: skip
# For a machine of two cores that is busy with much else; it costs nothing where things work.
COMMAND_SECONDS = 300.0
# How many are held, and, when it is none, what the queues have forgotten: a script is one command for all of it.
EMPTY_QUEUES = "local n = redis.call('HLEN', 'unacked') if n == 0 then redis.call('DEL', unpack(KEYS)) end return n"
QUEUES = ("celery", "io", "one", "unacked_index")
# What tests change, and `settle` sets back.
CHANGED = ("BEAT_SCHEDULE", "WORKER_SOFT_SHUTDOWN")

SENDER = """
import json, sys
from services.app import app
app.loader.import_default_modules()
order = json.load(sys.stdin)
sent = [app.tasks[order["task"]].apply_async(args, **order["options"]) for args in order["arguments"]]
print(json.dumps([result.id for result in sent]))
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment of a person who has just opened a shell, and these variables."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"LANG": "C.UTF-8"} | variables


def clone(directory: Path, mode_mask: int = 0) -> Path:
    """Copy to `directory` what git knows of this checkout, without the bits of `mode_mask`.

    What somebody has put beside it stays there: data, tasks of their own, what they try out. A new file of Stalk is
    copied once it was added.
    """
    # Not the caller's environment: inside a hook git's own variables name another index.
    done = run(["git", "-c", "safe.directory=*", "ls-files", "-z"], ROOT, environment(), COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr
    for name in filter(None, done.stdout.split("\0")):
        # A file that was deleted and not committed is still listed.
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    # The packages are those of the checkout, so that a test need not fetch them again.
    (directory / ".venv").symlink_to(ROOT / ".venv")
    for path in [directory, *directory.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~mode_mask)
    return directory


def save(path: Path, text: str) -> None:
    """As many editors do it: at once, by another name."""
    new = path.with_suffix(".tmp")
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep the other workers of this session, and other sessions, from their first `make up`: it builds base images."""
    with (Path(tempfile.gettempdir()) / f"stalk-test-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Stack(Deployment):
    """The stack in containers: a Compose project."""

    # Compose reads the whole project for each question, and each `docker` is a program of its own.
    look_seconds = 0.2

    def __init__(self, directory: Path, project: str, **settings: str) -> None:
        super().__init__(directory, settings)
        self.project = project
        self.override = directory / "compose.override.yaml"
        self._started_with = ""

    # ---- commands, as a person types them

    def environment(self, **variables: str) -> dict[str, str]:
        """The settings that the tests make are variables of the shell, which beat those in .env."""
        own = {"COMPOSE_PROJECT_NAME": self.project, "FLOWER_PORT": str(self.port)}
        return environment(**own | self.settings | variables)

    def make(self, target: str, *arguments: Any, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run `make target NAME=value`, and remember the .env with which the stack was started."""
        done = super().make(target, *arguments, **variables)
        if target == "up" and self.env_file.exists():
            self._started_with = self.env_file.read_text()
        return done

    def compose(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = COMMAND_SECONDS,
        given: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose …` in the clone, with `given` as its input and some variables set in the shell."""
        command = ["docker", "compose", *arguments]
        done = run(command, self.directory, self.environment(**(variables or {})), timeout, given)
        return self.checked(done) if check else done

    def docker(self, *arguments: str, check: bool = True, errors: bool = True) -> str:
        """`docker …`; what it printed, with its errors unless told otherwise."""
        done = run(["docker", *arguments], self.directory, self.environment(), COMMAND_SECONDS)
        if check:
            self.checked(done)
        return done.stdout + (done.stderr if errors else "")

    # ---- containers

    # Compose reads the whole project for each question, which takes ten times as long as to ask the engine.

    def ids(self, service: str = "") -> list[str]:
        """The containers' ids, stopped ones too, of one service or of all."""
        labels = [f"project={self.project}", *([f"service={service}"] if service else [])]
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        # What `docker compose run` started is no part of a service.
        filters.append("--filter=label=com.docker.compose.oneoff=False")
        return self.docker("ps", "--all", "--quiet", *filters).split()

    def inspected(self, service: str = "") -> list[dict[str, Any]]:
        """What the engine tells of each container, in the order of their names."""
        identifiers = self.ids(service)
        # One that is removed meanwhile is not told of.
        told = self.docker("inspect", *identifiers, check=False, errors=False) if identifiers else "[]"
        return sorted(json.loads(told), key=lambda container: str(container["Name"]))

    def containers(self, service: str = "") -> list[dict[str, str]]:
        """Id, name, service, state and health of each container, in the order of their names."""
        return [
            {
                "ID": container["Id"][:12],
                "Name": container["Name"].removeprefix("/"),
                "Service": container["Config"]["Labels"]["com.docker.compose.service"],
                "State": container["State"]["Status"],
                "Health": container["State"].get("Health", {}).get("Status", ""),
            }
            for container in self.inspected(service)
        ]

    def units(self) -> dict[str, str]:
        return {container["Name"]: container["ID"] for container in self.containers()}

    def readable(self) -> dict[str, str]:
        shown: dict[str, str] = {}
        for identifier in self.ids():
            container = self.inspect(identifier)
            # What it was given, by whoever may ask Docker to show it: docs/configuration.md says how to keep it out.
            assert container["Config"].pop("Env")
            name, image = container["Name"], container["Image"]
            shown |= {
                f"docker inspect {name}": json.dumps(container),
                f"docker logs {name}": self.docker("logs", identifier),
                f"docker top {name}": self.docker("top", identifier, "-eo", "pid,args"),
                f"the image of {name}": self.docker("history", "--no-trunc", image) + self.docker("inspect", image),
            }
            assert "PID" in shown[f"docker top {name}"]
        return shown

    def inspect(self, identifier: str) -> dict[str, Any]:
        return dict(json.loads(self.docker("inspect", identifier))[0])

    def environment_of(self, service: str) -> dict[str, str]:
        """What the container of a service was given."""
        return environment_of(self.inspected(service)[0])

    def execute(self, service: str, *command: str, check: bool = True, given: str = "") -> str:
        """What a command prints on its standard output inside the container of a service."""
        done = self.executed(service, *command, given=given)
        return (self.checked(done) if check else done).stdout

    def executed(self, service: str, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside the first container of a service that runs."""
        running = [container["ID"] for container in self.containers(service) if container["State"] == "running"]
        assert running, f"no container of {service} runs\n{self.describe()}"
        whole = ["docker", "exec", "--interactive", running[0], *command]
        return run(whole, self.directory, self.environment(), COMMAND_SECONDS, given)

    def shell(self, service: str, script: str, check: bool = True) -> str:
        """What a shell script prints inside the container of a service."""
        return self.execute(service, "sh", "-c", script, check=check)

    def network(self, name: str) -> dict[str, Any]:
        """A network of the project, by its name in compose.yaml."""
        labels = (f"com.docker.compose.project={self.project}", f"com.docker.compose.network={name}")
        found = self.docker("network", "ls", "--quiet", *(f"--filter=label={label}" for label in labels)).split()
        return dict(json.loads(self.docker("network", "inspect", *found))[0])

    def logs(self, service: str, *options: str) -> str:
        """All that the containers of a service have printed."""
        return "".join(self.docker("logs", *options, identifier, check=False) for identifier in self.ids(service))

    def describe(self) -> str:
        """State and last log lines of every container, for somebody who asks why a test failed."""
        parts = []
        for container in self.containers():
            last = self.docker("logs", "--tail", str(SHOWN_LOG_LINES), container["ID"], check=False)
            parts.append(f"--- {container['Name']}: {container['State']} {container['Health']}\n{last}")
        return "\n".join(parts)

    def wait_healthy(self, *services: str) -> None:
        """Return when every container, or every one of these services, is healthy."""

        def healthy() -> bool:
            chosen = [container for container in self.containers() if not services or container["Service"] in services]
            return bool(chosen) and all(container.get("Health") == "healthy" for container in chosen)

        self.wait(healthy, f"{', '.join(services) or 'every container'} healthy")

    # ---- tasks

    def call(self, task: str, *arguments: Any, wait: float = TIMEOUT_SECONDS) -> tuple[dict[str, Any], int]:
        """`python -m services call` inside the stack: the object that it printed, and its exit code."""
        options = ["--args", json.dumps(arguments), "--wait", f"{wait:g}"]
        done = self.executed("flower", "python", "-m", "services", "call", *options, "--", task)
        assert done.stdout, f"{done.stderr}\n{self.describe()}"
        return dict(json.loads(done.stdout)), done.returncode

    def send(self, task: str, *arguments: Sequence[Any], **options: Any) -> list[str]:
        """Send a task once for each list of arguments and wait for none of them; their ids."""
        order = json.dumps({"task": task, "arguments": arguments, "options": options})
        return list(json.loads(self.execute("flower", "python", "-c", SENDER, given=order)))

    def send_marks(self, *seconds: Sequence[float | None], **options: Any) -> "Marks":
        """Send the task `mark` once for each list of sleeps; None sleeps until `release()`."""
        name = uuid4().hex
        tasks = self.send("services.tasks.own_tasks.mark", *([name, sleeps] for sleeps in seconds), **options)
        return Marks(self, name, tasks)

    def redis(self, *arguments: str, database: int = 0) -> str:
        """What `redis-cli` prints."""
        script = f'REDISCLI_AUTH="$REDIS_PASSWORD" exec redis-cli -n {database} "$@"'
        return self.execute("redis", "sh", "-c", script, "redis-cli", *arguments).strip()

    def queued(self, queue: str = "celery") -> int:
        """How many tasks wait in a queue."""
        return int(self.redis("LLEN", queue))

    def purge_dead_letters(self) -> str:
        """`make purge-dead-letters` once all tasks were told, because it keeps those that are told just then."""
        self.wait(lambda: self.redis("SCARD", DEAD_LETTERS_UNTOLD) == "0", "every task of a dead letter was told")
        return self.make("purge-dead-letters", YES="1").stdout

    def stop_while_they_run(self, stop: Callable[[], T], *marks: "Marks") -> T:
        """Begin to stop, and wake the tasks once their worker was told to; what `stop` returned."""
        return self.while_stopping(stop, lambda: [*map(Marks.release, marks)])

    def shutdowns(self) -> int:
        return self.logs("worker").count(WARM_SHUTDOWN)

    def node_pid(self) -> int:
        """The process of the first node, by its own container's numbers."""
        script = "cat /run/stalk/supervisord.pid; for p in /proc/[0-9]*; do echo $p $(cut -d' ' -f4 $p/stat); done"
        supervisor, *parents = self.shell("worker", script, check=False).splitlines()
        children = [line.split() for line in parents if line.split()[1:] == [supervisor]]
        return int(children[0][0].rpartition("/")[2]) if children else 0

    def kill_node(self) -> None:
        # Before that, Supervisor would try again whatever autorestart says. The command is the one that a comment in
        # docker/supervisor/worker.conf promises.
        self.wait(lambda: "RUNNING" in self.shell("worker", "supervisorctl status", check=False), "node0 up for 10 s")
        (container,), before = self.ids("worker"), self.node_pid()
        self.shell("worker", f"kill -KILL {before}")
        self.wait(lambda: self.node_pid() not in (before, 0), "another process is node0")
        # Its other nodes would have gone on.
        assert self.ids("worker") == [container]
        assert self.inspect(container)["RestartCount"] == 0

    def kill_redis(self) -> str:
        """kill -9 of Redis, whose file has all that it has answered; its container."""
        # With everysec a busy disk lets it answer what it has not written yet, and a kill loses that: docs/delivery.md.
        always = 'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli CONFIG SET appendfsync always'
        assert self.shell("redis", always) == "OK\n"
        (redis,) = self.ids("redis")
        self.docker("kill", redis)
        # 128 and the signal's number.
        assert self.inspect(redis)["State"]["ExitCode"] == 137
        return redis

    # ---- Flower

    def login(self) -> str:
        """Flower's user:password."""
        return self.environment_of("flower")["FLOWER_BASIC_AUTH"]

    def nodes_in_flower(self) -> list[str]:
        """The workers that Flower shows."""
        answer = self.flower(f"{self.settings.get('FLOWER_URL_PREFIX', '')}/api/workers?status=1")
        return sorted(name for name, alive in answer.json().items() if alive) if answer.status == 200 else []

    # ---- order

    def set_variables(self, text: str) -> None:
        """Add lines to .env, as an editor would; later lines win."""
        self.env_file.write_text(self.env_file.read_text() + text)

    def settle(self) -> None:
        """One healthy container of each service and empty queues, whatever the test before has left behind."""
        found = self.inspected()
        health = sorted(container["State"].get("Health", {}).get("Status", "") for container in found)
        services = sorted(container["Config"]["Labels"]["com.docker.compose.service"] for container in found)
        whole = services == sorted(SERVICES) and set(health) == {"healthy"}
        if not whole or self._has_other_settings(found):
            self.override.unlink(missing_ok=True)
            self._started_with = self.env_file.read_text()
            scales = ("--scale", "worker=1", "--scale", "beat=1")
            self.compose("up", "--detach", "--remove-orphans", *scales, timeout=MAKE_SECONDS)
            self.wait_healthy()
        if self.redis("EVAL", EMPTY_QUEUES, str(len(QUEUES)), *QUEUES) != "0":
            # A test that has failed leaves tasks behind, which would stand in the way of the next one's.
            self.compose("stop", "worker")
            self.redis("DEL", *QUEUES, "unacked")
            self.compose("start", "worker")
            self.wait_healthy()

    def _has_other_settings(self, containers: list[dict[str, Any]]) -> bool:
        # Compose would say so too, but takes a second to do it.
        changed = self.override.exists() or self.env_file.read_text() != self._started_with
        given = [environment_of(container) for container in containers]
        return changed or any({one[name] for one in given if name in one} != {self.settings[name]} for name in CHANGED)

    def remains(self) -> dict[str, list[str]]:
        """What Docker still has of this project."""
        # The image before the last build has no name any more; `docker image prune` is its owner's business.
        kinds = {"ps": ("--all",), "volume ls": (), "network ls": (), "image ls": ("--filter=dangling=false",)}
        wanted = f"--filter=label=com.docker.compose.project={self.project}"
        found = {
            kind: self.docker(*kind.split(), *options, "--quiet", wanted).split() for kind, options in kinds.items()
        }
        return {kind: names for kind, names in found.items() if names}

    def remove(self) -> None:
        """Remove whatever is left of this project, whatever state it is in."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "1", check=False)
        # Not "--rmi all": base images belong to other stacks as well, and lose their name when they have another one.
        self.docker("image", "rm", "--force", f"{self.project}-app", check=False)
        label = f"label=com.docker.compose.project={self.project}"
        self.docker("image", "prune", "--force", f"--filter={label}", check=False)


class Marks:
    """Tasks that write down each start and end."""

    def __init__(self, stack: Stack, name: str, tasks: list[str]) -> None:
        self._stack = stack
        self._name = name
        self.tasks = tasks

    def all(self, what: str) -> list[dict[str, str]]:
        """What was written down: each `started` or each `finished`."""
        lines = self._stack.redis("LRANGE", f"marks:{self._name}", "0", "-1", database=1).splitlines()
        # redis-cli numbers and quotes what it prints on a terminal only.
        return [mark for mark in map(json.loads, filter(None, lines)) if mark["what"] == what]

    def nodes(self) -> set[str]:
        """The nodes that have started one of the tasks."""
        return {mark["node"] for mark in self.all("started")}

    def wait_started(self, count: int = 1) -> list[dict[str, str]]:
        """Every start, as soon as there are `count` of them."""
        self._stack.wait(lambda: len(self.all("started")) >= count, f"{count} tasks started")
        return self.all("started")

    def wait_finished(self) -> None:
        """Return when each of the tasks has run to its end."""
        self._stack.wait(lambda: not self.unfinished(), "every task finished")

    def release(self) -> None:
        """Wake the tasks that sleep until they are woken."""
        self._stack.redis("SET", f"release:{self._name}", "1", database=1)

    def unfinished(self) -> set[str]:
        """The tasks that have not come to their end."""
        return set(self.tasks) - {mark["task"] for mark in self.all("finished")}


def environment_of(container: Mapping[str, Any]) -> dict[str, str]:
    """What a container was given."""
    # One without = was named in compose.yaml and set nowhere.
    return dict(variable.split("=", 1) for variable in container["Config"]["Env"] if "=" in variable)


def sentences(text: str) -> list[str]:
    """The lines that say what is wrong."""
    return [line for line in text.splitlines() if re.match(r"error: ", line)]
