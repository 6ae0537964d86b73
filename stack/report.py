"""make status: what goes on, for people to read or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stack.docker import last_line
from stack.failure import Failure
from stack.units import Unit

if TYPE_CHECKING:
    from stack.runtime import Runtime

WIDTH = 200


def ask(runtime: Runtime) -> dict[str, Any]:
    """What `python -m services status` answers inside the stack.

    Raises Failure when the stack is not running or does not answer.
    """
    answered = runtime.execute("-m", "services", "status")
    try:
        answer = json.loads(answered.stdout)
    except json.JSONDecodeError:
        raise Failure(f"the stack could not tell its state: {last_line(answered.stderr)}") from None
    if "error" in answer:
        raise Failure(str(answer["error"]))
    return dict(answer)


def status(runtime: Runtime, as_json: bool) -> None:
    """Print units, nodes, queues and beat.

    Raises Failure when the stack is not running or does not answer.
    """
    units = runtime.units()
    if as_json:
        shown = [{key: value for key, value in asdict(unit).items() if key != "id"} for unit in units]
        print(json.dumps({"runtime": runtime.name, "units": shown, **ask(runtime)}))
        return
    # Where nobody looks at a terminal, lines are for grep and must not be folded.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_units(units))
    answer = ask(runtime)
    console.print(_nodes(answer["nodes"]))
    console.print(_queues(answer))
    seconds = answer["beat"]["seconds_since_tick"]
    console.print("Beat: no tick, no beat holds the lock" if seconds is None else f"Beat: last tick {seconds} s ago")


def _units(units: list[Unit]) -> Table:
    table = _table("Unit", "State", "Health", "Since")
    for unit in units:
        table.add_row(unit.name, unit.state, _coloured(unit), unit.detail)
    return table


def _coloured(unit: Unit) -> str:
    colour = "green" if unit.works else "red" if unit.failed or unit.health == "unhealthy" else "yellow"
    return f"[{colour}]{unit.health or '-'}[/]"


def _nodes(nodes: dict[str, Any]) -> Table:
    table = _table("Node", "Pool", "Size", "Running", "Queues")
    for name, node in nodes.items():
        running = ", ".join(task["name"].rpartition(".")[2] for task in node["running"])
        table.add_row(name, node["pool"], str(node["concurrency"]), running or "-", ", ".join(node["queues"]))
    return table


def _queues(answer: dict[str, Any]) -> Table:
    table = _table("Queue", "Waiting")
    for name, length in answer["queues"].items():
        table.add_row(name, str(length))
    table.add_row("held by workers (unacked)", str(answer["unacked"]))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def busy(answer: dict[str, Any]) -> str:
    """What the workers run and hold, in words; "" for nothing."""
    running = sum(len(node["running"]) for node in answer["nodes"].values())
    held = int(answer["unacked"]) - running
    if held <= 0:
        return f"{running} running" if running else ""
    # A node whose solo pool runs a task answers nobody, so its task is counted with those that wait for their ETA.
    return f"{running} running, {held} more held by workers (waiting for its time, or in a solo pool)"


def queued(answer: dict[str, Any]) -> str:
    """What waits in the queues, in words."""
    waiting = {name: length for name, length in answer["queues"].items() if length}
    return ", ".join(f"{length} in {name}" for name, length in waiting.items()) or "nothing"
