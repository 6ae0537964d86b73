"""A runtime runs the stack: containers where a Docker Engine answers, processes of this host where none does.

The choice is made once and kept in .stalk/runtime: a second Redis with other data would be a disaster.
"""

import subprocess
from dataclasses import dataclass
from typing import Protocol

from config import Settings
from stack import paths
from stack.docker import engine
from stack.errors import CommandError

NAMES = ("docker", "local")
# Arguments of Python for `python -m services`, and for a shell with the app and all tasks.
SERVICES = ("-m", "services")
SHELL = ("-m", "celery", "--app", "services.app", "shell")


@dataclass(frozen=True)
class Unit:
    """One container or process of the stack."""

    name: str
    service: str
    state: str
    # healthy, starting, unhealthy, or "" where there is no health check.
    health: str
    detail: str
    # It will not get healthy by itself.
    failed: bool = False

    @property
    def works(self) -> bool:
        """Whether it runs and is healthy, where there is a health check."""
        return self.state == "running" and self.health in ("healthy", "")


class Runtime(Protocol):
    """What a runtime can do. Everything raises CommandError where it cannot be done."""

    # As STALK_RUNTIME and .stalk/runtime have it.
    name: str
    # Where the stack and its data are, in words.
    where: str

    # --- make up, and make dev

    def require(self) -> None:
        """Raise CommandError when this host cannot run the stack so."""

    def count_cpus(self) -> int:
        """The CPUs of the machine that runs the stack, which need not be this one."""

    def prepare(self, settings: Settings) -> None:
        """Get what the stack runs on: Redis, images. May write into .env."""

    def check_new(self, from_source: bool) -> subprocess.CompletedProcess[str]:
        """Try to import what the next start will run, and return what was printed."""
        # Where there is no image, the source is what runs.
        return self.check_source()

    def start(self, settings: Settings, from_source: bool = False) -> None:
        """Start what is missing, and restart what has changed; running tasks finish first.

        `from_source`: until the next start, run this checkout's source in place of the image's.
        """

    def serves_flower_at(self, port: int) -> bool:
        """Whether it is our own Flower that has a port."""

    def check_source(self) -> subprocess.CompletedProcess[str]:
        """Try to import this checkout's source as it now is, and return what was printed."""

    def restart(self, settings: Settings) -> None:
        """Put changed source to work; running tasks finish first."""
        self.start(settings)

    # --- while it runs

    def scale(self, settings: Settings) -> None:
        """Run as many workers as the settings say, and leave the others as they are."""

    def list_units(self) -> list[Unit]:
        """Every unit, stopped ones too."""

    def read_last_lines(self, unit: Unit) -> str:
        """The end of a unit's log."""

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m services …` with the stack's settings, and return what it printed."""

    def show(self, *arguments: str) -> int:
        """Run `python -m services …` on the terminal; its exit code."""

    def run_shell(self) -> int:
        """Run Python with the app and its tasks on the terminal; its exit code."""

    def follow_logs(self, services: tuple[str, ...]) -> int:
        """Follow the logs of these services, or of all; the exit code."""

    # --- make stop, down and clean

    def stop_application(self, settings: Settings) -> None:
        """Stop beat and all workers; running tasks finish first."""

    def stop(self) -> None:
        """Stop what still runs, Redis last."""

    def remove(self, with_data: bool) -> None:
        """Stop everything and remove what runs, with or without its data."""


def make_runtime(name: str) -> Runtime:
    """The runtime of that name."""
    # Each only where it is used, because `make call` waits for every import.
    if name == "docker":
        from stack.docker.containers import Containers

        return Containers()
    from stack.local.processes import Processes

    return Processes()


def read_record() -> str:
    """The runtime that this checkout has used; "" before the first `make up`, CommandError for one that is none."""
    try:
        name = paths.RUNTIME_FILE.read_text().strip()
    except FileNotFoundError:
        return ""
    if name not in NAMES:
        raise CommandError(f"{paths.RUNTIME_FILE} says {name!r}, which is no runtime: write docker or local into it")
    return name


def write_record(runtime: Runtime) -> None:
    """Keep to this runtime from now on: it is about to have data."""
    paths.STATE.mkdir(mode=0o700, exist_ok=True)
    paths.RUNTIME_FILE.write_text(runtime.name + "\n")


def find_runtime(settings: Settings) -> Runtime:
    """The runtime for commands that only ask: what STALK_RUNTIME says, else what is recorded.

    It may be one that this host cannot run, which then does not answer.
    """
    name = settings.stack.runtime or read_record()
    if not name:
        # Nothing has run yet; a plain `docker compose up` leaves no record.
        name = "local" if engine.explain_missing_engine() else "docker"
    return make_runtime(name)


def require_runtime(settings: Settings) -> Runtime:
    """The same for commands that change something; CommandError when this host cannot run it."""
    runtime = find_runtime(settings)
    runtime.require()
    return runtime


def choose_runtime(settings: Settings) -> Runtime:
    """The runtime for `make up`: what STALK_RUNTIME says, else what is recorded, else chosen now. Prints which and why.

    Raises CommandError when this host cannot run it, or when the stack still runs in the other one.
    """
    before, asked = read_record(), settings.stack.runtime
    name, why = asked or before, "as STALK_RUNTIME says" if asked else "as before"
    if not name:
        missing = engine.explain_missing_engine()
        name, why = ("local", "no Docker Engine answers") if missing else ("docker", "a Docker Engine answers")
    runtime = make_runtime(name)
    try:
        runtime.require()
    except CommandError as error:
        if asked or before == "local":
            raise
        if not before:
            raise CommandError(f"{error}; or run the stack as processes of this host: make local") from None
        raise CommandError(
            f"{error}; this checkout's data is in Docker's volumes, so nothing was started without it (to start "
            "anew with processes and no data: STALK_RUNTIME=local make up)"
        ) from None
    if before and name != before:
        old = make_runtime(before)
        _require_stopped(old)
        print(
            f"Changing from {old.where}, to {runtime.where}: no data is taken along, what was queued stays there, and "
            f"STALK_RUNTIME={before} make up goes back to it."
        )
    print(f"Runtime: {name} ({why}).")
    return runtime


def _require_stopped(old: Runtime) -> None:
    """Raise CommandError when the stack runs in the runtime that is being left."""
    try:
        old.require()
    except CommandError:
        return
    if any(unit.state == "running" for unit in old.list_units()):
        raise CommandError(
            f"the stack still runs as {old.where}: stop it first with STALK_RUNTIME={old.name} make stop"
        )
