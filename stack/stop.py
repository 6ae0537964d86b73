"""make stop, down and clean: how the stack ends."""

from __future__ import annotations

import sys

import config
from stack import docker, report
from stack.failure import Failure


def stop() -> None:
    """Stop everything; running tasks finish first.

    Raises Failure.
    """
    docker.require_engine()
    if not any(container["State"] == "running" for container in docker.containers()):
        print("Nothing runs.")
        return
    try:
        running = report.running_tasks(report.ask())
        limit = config.load().worker.soft_shutdown
        print(f"{running} running; waiting for them, up to {limit} s …" if running else "No task runs.", flush=True)
    except Failure as failure:
        print(f"warning: the tasks that run could not be counted: {failure}")
    # Beat first, so that it sends nothing more; Redis last, because workers hand back to it.
    docker.compose("stop", *application_services())
    print(f"Workers have stopped. {left()}", flush=True)
    docker.compose("stop")
    print("Stopped; 'make up' goes on where it was.")


def application_services() -> list[str]:
    """Every service that sends or runs tasks, those of a compose.override.yaml too."""
    services = docker.compose("config", "--services").stdout.split()
    return [name for name in services if name not in ("redis", "flower")]


def left() -> str:
    """What stays queued, asked while Redis still runs."""
    try:
        return f"Still queued: {report.queued(report.ask())}."
    except Failure as failure:
        return f"What stays queued could not be read: {failure}."


def down() -> None:
    """Stop everything and remove the containers; volumes stay."""
    docker.require_engine()
    docker.compose("down")
    print("Removed the containers; the data is kept, and 'make up' goes on with it.")


def clean(yes: bool) -> None:
    """Remove containers, volumes and the image, after asking.

    Raises Failure when nobody can be asked.
    """
    docker.require_engine()
    if not yes:
        if not sys.stdin.isatty():
            raise Failure("this deletes all queued tasks and results, and nobody can be asked: run 'make clean YES=1'")
        if input("This deletes all queued tasks and results for ever. Type yes to go on: ") != "yes":
            raise Failure("nothing was deleted")
    docker.compose("down", "--volumes", "--rmi", "local")
    print("Removed the containers and all data; .env is kept.")
