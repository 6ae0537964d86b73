"""The stack in containers: compose.yaml, on the Docker Engine that answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from config import Settings
from config.environment import process_environment, read_env_file
from stack import env_file, paths
from stack.docker import engine, images
from stack.docker.engine import compose, compose_shown, run
from stack.errors import Failure
from stack.paths import ROOT, SOURCE
from stack.terminal import attached
from stack.units import SHELL, Unit

# All of these carry the application and reach Redis.
CARRIERS = ("worker", "beat", "flower")
SERVICES = ("python", "-m", "services")
CHECK = ("python", "-m", "services.commands.check")
LOG_LINES = "15"
BUILD_LINES = 25


class Containers:
    """The stack as containers of Compose."""

    name = "docker"
    where = "containers, their data in Docker's volumes"

    def __init__(self) -> None:
        # The application's image before we have built it anew; "" where there was none.
        self._image_before = ""

    def require(self) -> None:
        """Raise Failure unless a Docker Engine answers, and it and its Compose are new enough."""
        engine.require_engine()

    def prepare(self, settings: Settings) -> None:
        """Get the base images and build the application's.

        Raises Failure.
        """
        require_cpus(settings)
        make_readable(ROOT / "docker" / "redis")
        images.prepare(settings)
        self._image_before = run("docker", "image", "inspect", "--format={{.Id}}", image(), check=False).stdout.strip()
        print("Building the application image …")
        if sys.stdout.isatty():
            # The builder shows best itself what it does and for how long.
            if compose_shown("build", "worker") != 0:
                raise Failure("the application image could not be built; the builder's last lines are above")
            return
        built = compose("build", "worker", check=False)
        if built.returncode != 0:
            lines = "\n".join((built.stdout + built.stderr).rstrip().splitlines()[-BUILD_LINES:])
            raise Failure(f"the application image could not be built; the builder's last lines are\n{lines}")

    def start(self, settings: Settings) -> None:
        """Create and start what is missing or changed.

        Raises Failure.
        """
        if redis_files_changed():
            compose(*files(), "up", "--detach", "--force-recreate", "--no-deps", "redis")
        known = compose(*files(), "config", "--services").stdout.split()
        for gone in sorted({unit.service for unit in self.units()} - set(known)):
            print(f"Removing {gone}, which no Compose file of this stack names any more …")
        # A service that was taken out of compose.override.yaml would go on with old code.
        started = compose(*files(), "up", "--detach", "--remove-orphans", check=False)
        if started.returncode != 0:
            # A Redis that does not get healthy is told by its own log lines.
            unhealthy = [unit for unit in self.units() if unit.health == "unhealthy"]
            why = self.last_lines(unhealthy[0]) if unhealthy else engine.last_line(started.stderr)
            raise Failure(f"the stack could not be started: {without_colour(why)}")

    def use_source(self, asked: bool) -> None:
        """From the next start on, mount this checkout's source over the image's, or no longer."""
        if not asked:
            paths.DEV_COMPOSE.unlink(missing_ok=True)
            return
        mounts = [
            {"type": "bind", "source": escaped(ROOT / name), "target": f"/app/{name}", "read_only": True}
            for name in SOURCE
        ]
        described = json.loads(compose("config", "--format", "json").stdout)["services"]
        # Workers of a compose.override.yaml too: whatever runs the application's image.
        services = [name for name, service in described.items() if service.get("image") == described["worker"]["image"]]
        paths.DEV_COMPOSE.write_text(json.dumps({"services": {name: {"volumes": mounts} for name in services}}))
        make_source_readable()

    def check_source(self) -> subprocess.CompletedProcess[str]:
        """Look at changed source where it runs, and return what was said of it."""
        make_source_readable()
        return run("docker", "exec", _carrier()["ID"], *CHECK, check=False)

    def check_new(self, from_source: bool) -> subprocess.CompletedProcess[str]:
        """Look at what the next start will run, the new image or this checkout's source, and return what was said."""
        mounts = [f"--volume={ROOT / name}:/app/{name}:ro" for name in SOURCE] if from_source else []
        if from_source:
            make_source_readable()
        # As a worker is, but for what it needs besides: the check needs no Redis.
        once = ("run", "--rm", "--no-deps", "-T", "--quiet-pull", *mounts, "--entrypoint", CHECK[0])
        tried = compose(*once, "worker", *CHECK[1:], check=False)
        if tried.returncode != 0 and self._image_before:
            # A container that is added meanwhile, as by `make scale`, has to run what the others run.
            run("docker", "tag", self._image_before, image(), check=False)
        return tried

    def restart(self, settings: Settings) -> None:
        """Put changed source to work: the nodes first, warm, then beat and Flower.

        Raises Failure when a node cannot be started.
        """
        running = [unit for unit in self.units() if unit.state == "running"]
        nodes = [unit for unit in running if unit.service not in ("redis", "beat", "flower")]
        codes = apart(*(["docker", "exec", unit.id, "python", "-m", "services.supervisor.restart"] for unit in nodes))
        failed = [unit for unit, code in zip(nodes, codes, strict=True) if code != 0]
        if failed:
            raise Failure(f"{failed[0].name} did not get ready; its last lines are\n{self.last_lines(failed[0])}")
        others = [unit.id for unit in running if unit.service in ("beat", "flower")]
        if others:
            apart(["docker", "restart", *others])

    def scale(self, settings: Settings) -> None:
        """Run as many worker containers as the settings say, leaving the others as they are.

        Raises Failure.
        """
        require_cpus(settings)
        compose(*files(), "up", "--detach", "--no-recreate", "--scale", f"worker={settings.stack.workers}")

    def units(self) -> list[Unit]:
        """Every container of the project, stopped ones too."""
        return [_unit(container) for container in engine.containers()]

    def last_lines(self, unit: Unit) -> str:
        """The end of a container's log."""
        logged = run("docker", "logs", "--tail", LOG_LINES, unit.id, check=False)
        return (logged.stdout + logged.stderr).rstrip()

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m services …` inside the stack and return what it printed."""
        # Not `docker compose exec`, which reads all of the Compose files again.
        return run("docker", "exec", _carrier()["ID"], *SERVICES, *arguments, check=False)

    def show(self, *arguments: str) -> int:
        """Run `python -m services …` on the terminal; its exit code."""
        return attached(["docker", "exec", *terminal_options(), _carrier()["ID"], *SERVICES, *arguments], ROOT)

    def shell(self) -> int:
        """Python with the app and its tasks, on the terminal; its exit code."""
        return compose_shown("exec", _carrier()["Service"], "python", *SHELL)

    def logs(self, services: tuple[str, ...]) -> int:
        """Follow the logs, of all services or of some."""
        known = compose("config", "--services").stdout.split()
        for name in services:
            if name not in known:
                raise Failure(f"SERVICE: found {name!r}; there are {', '.join(sorted(known))}")
        return compose_shown("logs", "--follow", "--tail", "100", *services)

    def stop_application(self, settings: Settings) -> None:
        """Stop beat and all workers, those of a compose.override.yaml too; running tasks finish first."""
        services = compose("config", "--services").stdout.split()
        compose("stop", *(name for name in services if name not in ("redis", "flower")))

    def stop(self) -> None:
        """Stop what still runs, Redis last."""
        compose("stop")

    def remove(self) -> None:
        """Stop everything and remove the containers; volumes stay."""
        compose("down", "--remove-orphans")

    def delete_data(self) -> None:
        """Remove containers, volumes and the image."""
        compose("down", "--remove-orphans", "--volumes", "--rmi", "local")

    def publishes(self, port: int) -> bool:
        """Whether our own Flower holds a port."""
        return any(
            publisher.get("PublishedPort") == port
            for container in engine.containers()
            if container["Service"] == "flower"
            for publisher in container.get("Publishers") or []
        )


def require_cpus(settings: Settings) -> None:
    """Raise Failure for a limit above the CPUs that there are: Docker would refuse the container, after others."""
    limit, there = settings.stack.worker_cpus, engine.cpus()
    if float(limit) > there:
        raise Failure(
            f"WORKER_CPUS is {limit}, and the CPUs of Docker's machine are {there}: set at most that in .env, or 0 for "
            "no limit"
        )


def terminal_options() -> list[str]:
    """Options of `docker exec` that pass this terminal on: its width, its colour, and its keyboard."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return []
    environment = process_environment()
    passed = [f"--env={name}={environment[name]}" for name in ("NO_COLOR", "TERM") if name in environment]
    return ["--tty", *(["--interactive"] if sys.stdin.isatty() else []), *passed]


def image() -> str:
    """The application's image, as compose.yaml names it."""
    return f"{engine.project()}-app"


def _carrier() -> dict[str, Any]:
    """A container that can be asked.

    Raises Failure when none runs.
    """
    running = {container["Service"]: container for container in engine.containers() if container["State"] == "running"}
    for service in CARRIERS:
        if service in running:
            return running[service]
    raise Failure("the stack is not running: start it with 'make up'")


def _unit(container: dict[str, Any]) -> Unit:
    state, health = str(container["State"]), str(container.get("Health") or "")
    return Unit(
        name=str(container["Name"]),
        service=str(container["Service"]),
        state=state,
        health=health,
        detail=str(container["Status"]),
        id=str(container["ID"]),
        failed=_keeps_ending(str(container["ID"]), state),
    )


def _keeps_ending(container: str, state: str) -> bool:
    """Whether a container has ended by itself more than once."""
    if state not in ("restarting", "exited", "dead"):
        return False
    count = run("docker", "inspect", "--format", "{{.RestartCount}}", container, check=False).stdout
    return state != "restarting" or int(count.strip() or 0) > 1


def apart(*commands: list[str]) -> list[int]:
    """Run commands at the same time, in sessions of their own because Ctrl-C is not for them; their exit codes."""
    started = [subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) for command in commands]
    return [process.wait() for process in started]


def files() -> list[str]:
    """Options that name the Compose files, where they are not those that Compose takes by itself."""
    if not paths.DEV_COMPOSE.exists():
        return []
    chosen = (read_env_file(env_file.ENV_FILE) | process_environment()).get("COMPOSE_FILE", "")
    own = [name for name in ("compose.yaml", "compose.override.yaml") if (ROOT / name).exists()]
    names = chosen.split(os.pathsep) if chosen else own
    return [word for name in (*names, str(paths.DEV_COMPOSE)) for word in ("--file", name)]


def escaped(path: Path) -> str:
    """A path as a Compose file has to have it: $ begins a variable there."""
    return str(path).replace("$", "$$")


def make_source_readable() -> None:
    """Let the containers' user read the source that is mounted."""
    for name in SOURCE:
        for directory in (ROOT / name, *(path for path in (ROOT / name).rglob("*") if path.is_dir())):
            make_readable(directory)


def make_readable(directory: Path) -> None:
    """Let the container's user read what is mounted from a checkout made with umask 077."""
    for path, bits in [(directory, 0o055), *((file, 0o044) for file in directory.iterdir())]:
        mode = path.stat().st_mode
        if mode & bits != bits:
            path.chmod(mode | bits)


def redis_files_changed() -> bool:
    """Whether docker/redis/ is newer than the running Redis, which Compose does not look at."""
    redis = [container for container in engine.containers() if container["Service"] == "redis"]
    if not redis:
        return False
    created = run("docker", "inspect", "--format", "{{.Created}}", str(redis[0]["ID"])).stdout.strip()
    newest = max(file.stat().st_mtime for file in (ROOT / "docker" / "redis").iterdir())
    return newest > timestamp(created)


def timestamp(text: str) -> float:
    """Seconds since 1970 of a time as Docker prints it, with nanoseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d*", r"\1", text)).timestamp()


def without_colour(text: str) -> str:
    """`text` without terminal escapes."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
