"""make status: the units, which only the host sees; nodes, queues and beat are printed inside the stack."""

import json
import sys
from dataclasses import asdict
from typing import Any

from services.commands.output import GREEN, RED, YELLOW, print_table
from stack.env_file import load_or_defaults
from stack.errors import CommandError
from stack.runtime import Runtime, Unit, find_runtime
from stack.terminal import find_last_line


def status(as_json: bool) -> None:
    """Print units, nodes, queues and beat; CommandError when the stack is not running or does not answer."""
    runtime = find_runtime(load_or_defaults())
    units = runtime.list_units()
    if as_json:
        print(json.dumps({"runtime": runtime.name, "units": [asdict(unit) for unit in units], **ask(runtime)}))
        return
    rows = ((unit.name, unit.state, (unit.health or "-", _colour(unit)), unit.detail) for unit in units)
    print_table(rows, header=("Unit", "State", "Health", "Since"))
    starting = any(unit.service.startswith("worker") and unit.health == "starting" for unit in units)
    sys.exit(runtime.show("status", *(["--starting"] if starting else [])))


def _colour(unit: Unit) -> str:
    return GREEN if unit.works else RED if unit.failed or unit.health == "unhealthy" else YELLOW


def ask(runtime: Runtime) -> dict[str, Any]:
    """What `python -m services status --json` prints inside the stack; CommandError when that is an error."""
    answered = runtime.ask("status", "--json")
    try:
        state = json.loads(answered.stdout)
    except json.JSONDecodeError:
        raise CommandError(f"the state of the stack could not be read: {find_last_line(answered.stderr)}") from None
    if "error" in state:
        raise CommandError(str(state["error"]))
    return dict(state)


def describe_running(state: dict[str, Any]) -> str:
    """What workers run and hold, in words; "" for nothing."""
    running = sum(len(node["running"]) for node in state["nodes"].values())
    others = int(state["unacked"]) - running
    if others <= 0:
        return f"{running} running" if running else ""
    # A node whose solo pool runs a task answers nobody, so its task is counted with those that wait for their ETA.
    return f"{running} running, {others} more held by workers (waiting for its time, or in a solo pool)"


def describe_queued(state: dict[str, Any]) -> str:
    """What waits in the queues, in words."""
    return ", ".join(f"{length} in {name}" for name, length in state["queues"].items() if length) or "nothing"
