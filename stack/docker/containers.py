"""The runtime of containers: compose.yaml, on a Docker Engine."""

import json
import os
import re
import subprocess
import sys
from datetime import datetime

import click

from config import ConfigError, Settings
from config.environment import process_environment, read_env_file
from stack import env_file, paths, ports
from stack.docker import engine, images
from stack.docker.engine import ANSWER_SECONDS, run_compose, show_compose
from stack.errors import CommandError
from stack.paths import ROOT, SOURCE
from stack.runtime import SERVICES, SHELL, Runtime, Unit
from stack.terminal import find_last_line, run, run_attached

# Each of these has the application and reaches Redis.
APPLICATION = ("worker", "beat", "flower")
CHECK = ("-m", "services.commands.check")
# A command beside running tasks: when the container has no memory left, the kernel kills it before any of them.
PYTHON = ("choom", "--adjust", "1000", "--", "python")
LOG_LINES = "15"
BUILD_LINES = 25


class Containers(Runtime):
    """The stack as containers of Compose."""

    name = "docker"
    where = "containers, their data in Docker's volumes"

    def __init__(self) -> None:
        # The id of the application's image before the build; "" where there was none.
        self._image_before = ""

    def require(self) -> None:
        engine.require_engine()

    def count_cpus(self) -> int:
        return engine.count_cpus()

    def prepare(self, settings: Settings) -> None:
        """Get the base images and build the application's."""
        require_cpus(settings)
        make_readable("docker/redis")
        images.prepare(settings)
        inspect = ("docker", "image", "inspect", "--format={{.Id}}", read_image_name())
        self._image_before = run(*inspect, check=False).stdout.strip()
        print("Building the application image …")
        if sys.stdout.isatty():
            # The builder draws its progress.
            if show_compose("build", "worker") != 0:
                raise CommandError("the application image could not be built; the builder's last lines are above")
            return
        built = run_compose("build", "worker", check=False)
        if built.returncode != 0:
            lines = "\n".join((built.stdout + built.stderr).rstrip().splitlines()[-BUILD_LINES:])
            raise CommandError(f"the application image could not be built; the builder's last lines are\n{lines}")

    def check_new(self, from_source: bool) -> subprocess.CompletedProcess[str]:
        """Try the new image, or this checkout's source in it; where that fails, take the image from before again."""
        mounts = [f"--volume={ROOT / name}:/app/{name}:ro" for name in SOURCE] if from_source else []
        if from_source:
            make_readable(*SOURCE)
        # As a worker is configured, but without Redis, which the check does not need.
        options = ("--rm", "--no-deps", "-T", "--quiet-pull", *mounts, "--entrypoint", "python")
        check = run_compose("run", *options, "worker", *CHECK, check=False)
        if check.returncode != 0 and self._image_before:
            # A container that is added meanwhile, as by `make scale`, has to run what the others run.
            run("docker", "tag", self._image_before, read_image_name(), check=False)
        return check

    def start(self, settings: Settings, from_source: bool = False) -> None:
        if from_source:
            mount_source()
        else:
            paths.DEV_COMPOSE.unlink(missing_ok=True)
        if self._have_redis_files_changed():
            run_compose(*list_file_options(), "up", "--detach", "--force-recreate", "--no-deps", "redis")
        known = run_compose(*list_file_options(), "config", "--services").stdout.split()
        for gone in sorted({unit.service for unit in self.list_units()} - set(known)):
            print(f"Removing {gone}, which no Compose file of this stack names any more …")
        # A service that was taken out of compose.override.yaml would go on with old code.
        started = run_compose(*list_file_options(), "up", "--detach", "--remove-orphans", check=False)
        if started.returncode != 0:
            # Of a Redis that does not get healthy Compose says no more than that; its log says why.
            unhealthy = [unit for unit in self.list_units() if unit.health == "unhealthy"]
            why = self.read_last_lines(unhealthy[0]) if unhealthy else find_last_line(started.stderr)
            why = ports.explain_error_of_docker(click.unstyle(why), settings)
            raise CommandError(f"the stack could not be started: {why}")

    def _have_redis_files_changed(self) -> bool:
        """Whether docker/redis/, which is mounted, is newer than the redis container; Compose does not compare it."""
        redis = [unit.name for unit in self.list_units() if unit.service == "redis"]
        if not redis:
            return False
        created = run("docker", "inspect", "--format", "{{.Created}}", redis[0]).stdout.strip()
        newest = max(file.stat().st_mtime for file in (ROOT / "docker" / "redis").iterdir())
        return newest > datetime.fromisoformat(created).timestamp()

    def serves_flower_at(self, port: int) -> bool:
        names = [unit.name for unit in self.list_units() if unit.service == "flower"]
        return any(f":{port}\n" in run("docker", "port", name, check=False).stdout for name in names)

    def check_source(self) -> subprocess.CompletedProcess[str]:
        make_readable(*SOURCE)
        return run("docker", "exec", self._find_application().name, *PYTHON, *CHECK, check=False)

    def restart(self, settings: Settings) -> None:
        """Restart the nodes first, then beat and Flower."""
        running = [unit for unit in self.list_units() if unit.state == "running"]
        nodes = [unit for unit in running if unit.service not in ("redis", "beat", "flower")]
        command = (*PYTHON, "-m", "services.supervisor.restart")
        codes = run_together(*(["docker", "exec", unit.name, *command] for unit in nodes))
        failed = [unit for unit, code in zip(nodes, codes, strict=True) if code != 0]
        if failed:
            lines = self.read_last_lines(failed[0])
            raise CommandError(f"{failed[0].name} did not get ready; its last lines are\n{lines}")
        others = [unit.name for unit in running if unit.service in ("beat", "flower")]
        if others:
            run_together(["docker", "restart", *others])

    def scale(self, settings: Settings) -> None:
        require_cpus(settings)
        workers = f"worker={settings.stack.workers}"
        run_compose(*list_file_options(), "up", "--detach", "--no-recreate", "--scale", workers)

    def list_units(self) -> list[Unit]:
        # Compose takes 0.2 s longer; it is asked where there seems to be none, because it reads all Compose files.
        return [_make_unit(*container) for container in sorted(_list_by_label() or _list_with_compose())]

    def _find_application(self) -> Unit:
        """A running container that has the application; CommandError where there is none."""
        running = {unit.service: unit for unit in self.list_units() if unit.state == "running"}
        for service in APPLICATION:
            if service in running:
                return running[service]
        raise CommandError("the stack is not running: start it with 'make up'")

    def read_last_lines(self, unit: Unit) -> str:
        logged = run("docker", "logs", "--tail", LOG_LINES, unit.name, check=False)
        return (logged.stdout + logged.stderr).rstrip()

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Not `docker compose exec`, which reads all of the Compose files again.
        return run("docker", "exec", self._find_application().name, *PYTHON, *SERVICES, *arguments, check=False)

    def show(self, *arguments: str) -> int:
        application = self._find_application().name
        return run_attached(["docker", "exec", *terminal_options(), application, *PYTHON, *SERVICES, *arguments], ROOT)

    def run_shell(self) -> int:
        return show_compose("exec", self._find_application().service, *PYTHON, *SHELL)

    def follow_logs(self, services: tuple[str, ...]) -> int:
        known = run_compose("config", "--services").stdout.split()
        for name in services:
            if name not in known:
                raise CommandError(f"SERVICE: found {name!r}; there are {', '.join(sorted(known))}")
        return show_compose("logs", "--follow", "--tail", "100", *services)

    def stop_application(self, settings: Settings) -> None:
        # Workers of a compose.override.yaml too.
        services = run_compose("config", "--services").stdout.split()
        run_compose("stop", *(name for name in services if name not in ("redis", "flower")))

    def stop(self) -> None:
        run_compose("stop")

    def remove(self, with_data: bool) -> None:
        run_compose("down", "--remove-orphans", *(("--volumes", "--rmi", "local") if with_data else ()))


def require_cpus(settings: Settings) -> None:
    """Raise CommandError for a limit above the CPUs there are: Docker would refuse it when others have started."""
    limit, cpus = settings.stack.worker_cpus, engine.count_cpus()
    if float(limit) > cpus:
        raise CommandError(
            f"WORKER_CPUS is {limit}, and the CPUs of Docker's machine are {cpus}: set at most that in .env, or 0 for "
            "no limit"
        )


def terminal_options() -> list[str]:
    """Options of `docker exec` that pass this terminal on: its width, its colour, and its keyboard."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return []
    environment = process_environment()
    passed = [f"--env={name}={environment[name]}" for name in ("NO_COLOR", "TERM") if name in environment]
    return ["--tty", *(["--interactive"] if sys.stdin.isatty() else []), *passed]


def read_image_name() -> str:
    """The name of the application's image, as compose.yaml has it."""
    return f"{read_project_name()}-app"


def read_project_name() -> str:
    """The project's name, as .env, the shell and compose.yaml have it; "" where .env has mistakes.

    A Compose file of the user may give it another one.
    """
    try:
        chosen = (read_env_file(env_file.ENV_FILE) | process_environment()).get("COMPOSE_PROJECT_NAME", "")
    except ConfigError:
        return ""
    return chosen or re.findall(r"(?m)^name: (\S+)", (ROOT / "compose.yaml").read_text())[0]


def _list_by_label() -> list[list[str]]:
    """Name, service, state and status of the containers that Compose has labelled with this project and directory."""
    name = read_project_name()
    if not name:
        return []
    labels = {"project": name, "project.working_dir": str(ROOT), "oneoff": "False"}
    filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
    form = '{{.Names}}\t{{.Label "com.docker.compose.service"}}\t{{.State}}\t{{.Status}}'
    try:
        listed = run("docker", "ps", "--all", *filters, "--format", form, timeout=ANSWER_SECONDS)
    except CommandError as error:
        raise CommandError(engine.explain_missing_engine() or str(error)) from None
    return [line.split("\t") for line in listed.stdout.splitlines()]


def _list_with_compose() -> list[list[str]]:
    """The same of the containers that Compose lists."""
    # One object a line.
    listed = map(json.loads, run_compose("ps", "--all", "--format", "json").stdout.splitlines())
    return [[one["Name"], one["Service"], one["State"], one["Status"]] for one in listed]


def _make_unit(name: str, service: str, state: str, status: str) -> Unit:
    """The unit of a container; it has failed when it has ended for good, or more than once by itself."""
    failed = state in ("exited", "dead")
    if state == "restarting":
        count = run("docker", "inspect", "--format", "{{.RestartCount}}", name, check=False).stdout
        failed = int(count.strip() or 0) > 1
    health = re.search(r"\((?:health: )?(starting|healthy|unhealthy)\)", status)
    return Unit(name, service, state, health[1] if health else "", status, failed)


def run_together(*commands: list[str]) -> list[int]:
    """Run commands at the same time, in sessions of their own so that Ctrl-C does not reach them; their exit codes."""
    started = [subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) for command in commands]
    return [process.wait() for process in started]


def list_file_options() -> list[str]:
    """Options that name the Compose files, where `make dev` adds one to those that Compose takes by itself."""
    if not paths.DEV_COMPOSE.exists():
        return []
    chosen = (read_env_file(env_file.ENV_FILE) | process_environment()).get("COMPOSE_FILE", "")
    own = [name for name in ("compose.yaml", "compose.override.yaml") if (ROOT / name).exists()]
    names = chosen.split(os.pathsep) if chosen else own
    return [word for name in (*names, str(paths.DEV_COMPOSE)) for word in ("--file", name)]


def mount_source() -> None:
    """Write the Compose file that mounts this checkout's source over the image's."""
    # $ begins a variable in a Compose file.
    sources = {name: str(ROOT / name).replace("$", "$$") for name in SOURCE}
    mounts = [
        {"type": "bind", "source": source, "target": f"/app/{name}", "read_only": True}
        for name, source in sources.items()
    ]
    services = json.loads(run_compose("config", "--format", "json").stdout)["services"]
    # Workers of a compose.override.yaml too: whatever runs the application's image.
    image = services["worker"]["image"]
    names = [name for name, service in services.items() if service.get("image") == image]
    paths.DEV_COMPOSE.write_text(json.dumps({"services": {name: {"volumes": mounts} for name in names}}))
    make_readable(*SOURCE)


def make_readable(*directories: str) -> None:
    """Let the containers' user read what is mounted, also from a checkout made with umask 077."""
    for path in (inner for name in directories for inner in (ROOT / name, *(ROOT / name).rglob("*"))):
        mode, bits = path.stat().st_mode, 0o055 if path.is_dir() else 0o044
        if mode & bits != bits:
            path.chmod(mode | bits)
