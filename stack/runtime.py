"""Which runtime this checkout uses: containers where a Docker Engine answers, processes where none does.

The choice is made once and kept in .stalk/runtime: a second Redis with other data would be a disaster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from config import Settings
from stack import paths
from stack.docker import engine
from stack.docker.containers import Containers
from stack.errors import Failure

if TYPE_CHECKING:
    from stack.local.processes import Processes

    Runtime = Containers | Processes

NAMES = ("docker", "local")


def made(name: str) -> Runtime:
    """The runtime of that name."""
    if name == "docker":
        return Containers()
    # Only here, because it imports Supervisor and Celery, which take half a second.
    from stack.local.processes import Processes

    return Processes()


def recorded() -> str:
    """The runtime that this checkout has used; "" before the first `make up`.

    Raises Failure when the record cannot be read.
    """
    try:
        name = paths.RUNTIME_FILE.read_text().strip()
    except FileNotFoundError:
        return ""
    if name not in NAMES:
        raise Failure(f"{paths.RUNTIME_FILE} says {name!r}, which is no runtime: write docker or local into it")
    return name


def current(settings: Settings) -> Runtime:
    """The runtime for every command but `up`: the one asked for, else the recorded one.

    Raises Failure when it cannot be used.
    """
    runtime = chosen(settings)
    runtime.require()
    return runtime


def chosen(settings: Settings) -> Runtime:
    """The same for those that only ask what runs, which is soon seen not to answer."""
    name = settings.stack.runtime or recorded()
    if not name:
        # Nothing has run yet; a plain `docker compose up` leaves no record.
        name = "local" if engine.why_no_engine() else "docker"
    return made(name)


def choose(settings: Settings) -> Runtime:
    """The runtime for `up`: asked for, recorded, or chosen now; says which and why.

    Raises Failure when it cannot be used, or when the stack still runs in the other one.
    """
    before, asked = recorded(), settings.stack.runtime
    name, why = asked or before, "as STALK_RUNTIME says" if asked else "as before"
    if not name:
        missing = engine.why_no_engine()
        name, why = ("local", "no Docker Engine answers") if missing else ("docker", "a Docker Engine answers")
    runtime = made(name)
    try:
        runtime.require()
    except Failure as failure:
        if asked or before == "local":
            raise
        if not before:
            raise Failure(f"{failure}; or run the stack as processes of this host: make local") from None
        raise Failure(
            f"{failure}; this checkout's data is in Docker's volumes, so nothing was started without it (to start "
            "anew with processes and no data: STALK_RUNTIME=local make up)"
        ) from None
    if before and name != before:
        _refuse_two(before)
        print(
            f"Changing from {made(before).where}, to {runtime.where}: no data is taken along, what was queued stays "
            f"there, and STALK_RUNTIME={before} make up goes back to it."
        )
    print(f"Runtime: {name} ({why}).")
    return runtime


def record(chosen: Runtime) -> None:
    """Keep to this runtime from now on: it is about to have data."""
    paths.STATE.mkdir(mode=0o700, exist_ok=True)
    paths.RUNTIME_FILE.write_text(chosen.name + "\n")


def _refuse_two(before: str) -> None:
    """Raise Failure when the stack runs in the runtime that is being left."""
    old = made(before)
    try:
        old.require()
    except Failure:
        return
    if any(unit.state == "running" for unit in old.units()):
        raise Failure(f"the stack still runs as {old.where}: stop it first with STALK_RUNTIME={before} make stop")
