"""make status, make schedule: what goes on, for people to read or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stack.docker.engine import find_last_line
from stack.errors import CommandError
from stack.runtime import Unit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stack.runtime import Runtime

WIDTH = 200
# As services/broker/keys.py has them, which `make` does not import.
PRIORITIES = "nodes read 0, which is the most urgent, 3, 6 and 9"
UNREAD_HOW = "docs/operations.md#tasks-that-nobody-reads"
OVERTIME_HOW = "docs/operations.md#time-limits"


def ask(runtime: Runtime) -> dict[str, Any]:
    """The state of the stack.

    Raises CommandError when it is not running or does not answer.
    """
    return answer(runtime, "status")


def answer(runtime: Runtime, *command: str) -> dict[str, Any]:
    """What `python -m services COMMAND` answers inside the stack.

    Raises CommandError when the stack is not running, does not answer, or answers that it cannot.
    """
    answered = runtime.ask(*command)
    try:
        said = json.loads(answered.stdout)
    except json.JSONDecodeError:
        raise CommandError(f"the stack could not tell its state: {find_last_line(answered.stderr)}") from None
    if "error" in said:
        raise CommandError(str(said["error"]))
    return dict(said)


def console(width: int = WIDTH) -> Console:
    """Where people read; where nobody looks at a terminal, lines are for grep and must not be folded."""
    # Only here, because `make stop` and JSON need nothing of it.
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def status(runtime: Runtime, as_json: bool) -> None:
    """Print units, nodes, queues and beat.

    Raises CommandError when the stack is not running or does not answer.
    """
    units = runtime.list_units()
    if as_json:
        shown = [{key: value for key, value in asdict(unit).items() if key != "id"} for unit in units]
        print(json.dumps({"runtime": runtime.name, "units": shown, **ask(runtime)}))
        return
    screen = console()
    screen.print(_units(units))
    state = ask(runtime)
    screen.print(_nodes(state["nodes"]))
    screen.print(_queues(state))
    starting = any(unit.service.startswith("worker") and unit.health == "starting" for unit in units)
    for warning in warnings(state, starting):
        screen.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
    seconds = state["beat"]["seconds_since_tick"]
    screen.print("Beat: no tick, no beat holds the lock" if seconds is None else f"Beat: last tick {seconds} s ago")
    if letters := state["dead_letters"]:
        screen.print(f"[yellow]Dead letters: {letters}[/], see 'make dead-letters'")


def schedule(runtime: Runtime, as_json: bool) -> None:
    """Print every entry of beat's schedule.

    Raises CommandError when the stack is not running or does not answer.
    """
    said = answer(runtime, "schedule")
    if as_json:
        print(json.dumps(said))
        return
    rows = table("Entry", "From", "Task", "Schedule", "On", "Last run", "Next due")
    for one in said["schedule"]:
        on = one["problem"] or ("yes" if one["enabled"] else "no")
        cells = (one["name"], one["source"], one["task"], one["schedule"], on, one["last_run"], one["next_due"])
        rows.add_row(*(_plain(cell) for cell in cells))
    console().print(rows)


def _units(units: list[Unit]) -> Table:
    rows = table("Unit", "State", "Health", "Since")
    for unit in units:
        rows.add_row(unit.name, unit.state, _coloured(unit), unit.detail)
    return rows


def _coloured(unit: Unit) -> str:
    colour = "green" if unit.works else "red" if unit.failed or unit.health == "unhealthy" else "yellow"
    return f"[{colour}]{unit.health or '-'}[/]"


def _nodes(nodes: dict[str, Any]) -> Table:
    rows = table("Node", "Pool", "Size", "Running", "Queues")
    for name, node in nodes.items():
        running = ", ".join(task["name"].rpartition(".")[2] for task in node["running"])
        rows.add_row(name, node["pool"], str(node["concurrency"]), running or "-", ", ".join(node["queues"]))
    return rows


def _queues(state: dict[str, Any]) -> Table:
    rows = table("Queue", "Waiting")
    for name, length in state["queues"].items():
        rows.add_row(name, str(length))
    rows.add_row("held by workers (unacked)", str(state["unacked"]))
    rows.add_row("wait for their time (scheduled)", str(state["scheduled"]))
    return rows


def warnings(state: dict[str, Any], starting: bool) -> list[str]:
    """What waits in vain, and what runs too long; `starting`: a worker may be about to read more than is read now."""
    said = []
    if not state["nodes"] and not state["silent_nodes"]:
        said.append(f"No node answers{' yet' if starting else ''}; what waits: {queued(state)}.")
    if silent := state["silent_nodes"]:
        said.append(f"Nodes that do not answer, such as a solo pool at work: {silent}. What they read is not known.")
    for one in state["unread"]:
        name = one["queue"] + (f", priority {one['priority']} ({PRIORITIES})" if one["priority"] else "")
        soon = ", unless a worker that starts does" if starting else ""
        said.append(f"No node reads {name}{soon}: {_tasks(one['waiting'])} there, see {UNREAD_HOW}")
    for one in state["overtime"]:
        ran, limit = f"{one['seconds']:g} s", f"{one['limit']:g} s"
        task = f"{one['name']}[{one['id']}]"
        said.append(f"{one['node']} runs {task} for {ran}, and its limit is {limit}: see {OVERTIME_HOW}")
    return said


def _tasks(count: int) -> str:
    return f"{count} task{' waits' if count == 1 else 's wait'}"


def _plain(cell: str | None) -> Text:
    """A cell as it is: rich takes brackets in plain strings for colours."""
    from rich.text import Text

    return Text(cell or "-")


def table(*columns: str) -> Table:
    """An empty table of the kind that all commands print."""
    from rich.table import Table

    found = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        found.add_column(column, overflow="fold")
    return found


def busy(state: dict[str, Any]) -> str:
    """What the workers run and hold, in words; "" for nothing."""
    running = sum(len(node["running"]) for node in state["nodes"].values())
    held = int(state["unacked"]) - running
    if held <= 0:
        return f"{running} running" if running else ""
    # A node whose solo pool runs a task answers nobody, so its task is counted with those that wait for their ETA.
    return f"{running} running, {held} more held by workers (waiting for its time, or in a solo pool)"


def queued(state: dict[str, Any]) -> str:
    """What waits in the queues, in words."""
    waiting = {name: length for name, length in state["queues"].items() if length}
    return ", ".join(f"{length} in {name}" for name, length in waiting.items()) or "nothing"
