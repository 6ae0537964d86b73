"""make stop, down and clean: how the stack ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config import Settings
from stack import paths, terminal
from stack.commands import status
from stack.errors import Failure

if TYPE_CHECKING:
    from stack.runtime import Runtime


def stop(runtime: Runtime, settings: Settings) -> None:
    """Stop everything; running tasks finish first.

    Raises Failure.
    """
    if not any(unit.state == "running" for unit in runtime.units()):
        print("Nothing runs.")
        return
    stop_application(runtime, settings)
    runtime.stop()
    print("Stopped; 'make up' goes on where it was.")


def stop_application(runtime: Runtime, settings: Settings) -> None:
    """Stop beat and the workers, and say how many tasks ran and what stays queued."""
    try:
        busy, limit = status.busy(status.ask(runtime)), settings.worker.soft_shutdown
        print(f"{busy}; waiting for them, up to {limit} s …" if busy else "No task runs.")
    except Failure as failure:
        terminal.warning(f"the tasks that run could not be counted: {failure}")
    # Redis stays until the others have gone, because workers hand back to it.
    runtime.stop_application(settings)
    print(f"Workers have stopped. {left(runtime)}")


def left(runtime: Runtime) -> str:
    """What stays queued, asked while Redis still runs."""
    try:
        return f"Still queued: {status.queued(status.ask(runtime))}."
    except Failure as failure:
        return f"What stays queued could not be read: {failure}."


def down(runtime: Runtime) -> None:
    """Stop everything and remove what runs; data stays."""
    runtime.remove()
    print("Removed what ran; the data is kept, and 'make up' goes on with it.")


def clean(runtime: Runtime, yes: bool) -> None:
    """Remove what runs and all data, after asking.

    Raises Failure when nobody can be asked.
    """
    if not yes:
        terminal.ask_to_delete("queued tasks and results", "make clean YES=1")
    runtime.delete_data()
    # With the data gone, the next `make up` is free to choose again.
    paths.RUNTIME_FILE.unlink(missing_ok=True)
    print("Removed what ran and all data; .env is kept.")
