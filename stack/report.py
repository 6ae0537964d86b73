"""make status and make stop: what goes on, for people to read."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from stack import docker
from stack.failure import Failure

# All of these carry the application and reach Redis.
ASKABLE = ("worker", "beat", "flower")


def ask() -> dict[str, Any]:
    """What `python -m services status` answers inside the stack.

    Raises Failure when the stack is not running or does not answer.
    """
    service = docker.running_service(*ASKABLE)
    answered = docker.compose("exec", "-T", service, "python", "-m", "services", "status", check=False)
    try:
        answer = json.loads(answered.stdout)
    except json.JSONDecodeError:
        raise Failure(f"{service} could not tell the state: {docker.last_line(answered.stderr)}") from None
    if "error" in answer:
        raise Failure(str(answer["error"]))
    return dict(answer)


def status() -> None:
    """Print containers, nodes, queues and beat."""
    console = Console()
    console.print(_containers())
    answer = ask()
    console.print(_nodes(answer["nodes"]))
    console.print(_queues(answer))
    seconds = answer["beat"]["seconds_since_tick"]
    console.print("Beat: no tick, no beat holds the lock" if seconds is None else f"Beat: last tick {seconds} s ago")


def _containers() -> Table:
    table = _table("Container", "State", "Health", "Up")
    for container in docker.containers():
        table.add_row(container["Name"], container["State"], container.get("Health") or "-", container["Status"])
    return table


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


def running_tasks(answer: dict[str, Any]) -> int:
    """How many tasks run."""
    return sum(len(node["running"]) for node in answer["nodes"].values())


def queued(answer: dict[str, Any]) -> str:
    """What waits in the queues, in words."""
    waiting = {name: length for name, length in answer["queues"].items() if length}
    return ", ".join(f"{length} in {name}" for name, length in waiting.items()) or "nothing"
