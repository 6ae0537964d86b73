"""make stop, down and clean: stop the stack, remove what runs, delete its data."""

from __future__ import annotations

from config import Settings
from stack import paths, terminal
from stack.commands import status
from stack.errors import CommandError
from stack.runtime import Runtime


def stop(runtime: Runtime, settings: Settings) -> None:
    """Stop everything; running tasks finish first.

    Raises CommandError.
    """
    if not any(unit.state == "running" for unit in runtime.list_units()):
        print("Nothing runs.")
        return
    print_running_tasks(runtime, settings)
    # Redis stays until the others have gone, because workers hand back to it.
    runtime.stop_application(settings)
    print_queued_tasks(runtime)
    runtime.stop()
    print("Stopped; 'make up' goes on where it was.")


def print_running_tasks(runtime: Runtime, settings: Settings) -> None:
    """Print how many tasks are waited for, and for how long."""
    try:
        busy, limit = status.busy(status.ask(runtime)), settings.worker.soft_shutdown
        print(f"{busy}; waiting for them, up to {limit} s …" if busy else "No task runs.")
    except CommandError as error:
        terminal.print_warning(f"the tasks that run could not be counted: {error}")


def print_queued_tasks(runtime: Runtime) -> None:
    """Print what stays queued; Redis still runs."""
    try:
        left = f"Still queued: {status.queued(status.ask(runtime))}."
    except CommandError as error:
        left = f"What stays queued could not be read: {error}."
    print(f"Workers have stopped. {left}")


def down(runtime: Runtime) -> None:
    """Stop everything and remove what runs; data stays."""
    runtime.remove(with_data=False)
    print("Removed what ran; the data is kept, and 'make up' goes on with it.")


def clean(runtime: Runtime, yes: bool) -> None:
    """Remove what runs and all data, after asking.

    Raises CommandError when nobody can be asked, or the answer is not yes.
    """
    if not yes:
        terminal.confirm_deletion("queued tasks and results", "make clean YES=1")
    runtime.remove(with_data=True)
    # With the data gone, the next `make up` is free to choose again.
    paths.RUNTIME_FILE.unlink(missing_ok=True)
    print("Removed what ran and all data; .env is kept.")
