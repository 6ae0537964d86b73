"""Wait until every unit works, saying what is waited for and for how long."""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING

from stack.errors import Failure
from stack.units import Unit

if TYPE_CHECKING:
    from stack.runtime import Runtime

# Redis loading 1 GB takes 20 s, a first import of heavy tasks a minute: three minutes are a fault.
LIMIT_SECONDS = 180.0
LOOK_SECONDS = 0.3
# Somebody who waits for longer than that wonders whether anything goes on.
REPEAT_SECONDS = 15.0


def until_healthy(runtime: Runtime) -> None:
    """Return when every unit works.

    Raises Failure, with the last log lines of the one that does not, after LIMIT_SECONDS, or as soon as one
    keeps ending.
    """
    started, said, said_at = monotonic(), "", 0.0
    while waiting := [unit for unit in started_units(runtime) if not unit.works]:
        names = ", ".join(unit.name for unit in waiting)
        if names != said or monotonic() - said_at > REPEAT_SECONDS:
            print(f"Waiting for {names} ({monotonic() - started:.0f} s) …")
            said, said_at = names, monotonic()
        failed = [unit for unit in waiting if unit.failed]
        if failed or monotonic() - started > LIMIT_SECONDS:
            raise Failure(report(runtime, (failed or waiting)[0]))
        sleep(LOOK_SECONDS)


def started_units(runtime: Runtime) -> list[Unit]:
    """Every unit; Failure when there is none, because nothing that does not run works."""
    units = runtime.units()
    if not units:
        raise Failure("nothing runs any more: somebody has stopped the stack meanwhile")
    return units


def report(runtime: Runtime, unit: Unit) -> str:
    """What is wrong with a unit, and its last log lines."""
    lines = runtime.last_lines(unit)
    state = unit.health or unit.state
    return f"{unit.name} is {state} and does not work; its last lines are\n{lines}\nand 'make logs' shows more"
