"""make stop, down and clean: stop the stack, remove what runs, delete its data."""

import sys

from stack import paths, terminal
from stack.checkout_lock import lock_checkout
from stack.commands.status import ask, describe_queued, describe_running
from stack.env_file import load_or_defaults
from stack.errors import CommandError
from stack.runtime import Runtime, require_runtime


def stop() -> None:
    """Stop everything; running tasks finish first."""
    with lock_checkout():
        settings = load_or_defaults()
        runtime = require_runtime(settings)
        if not any(unit.state == "running" for unit in runtime.list_units()):
            print("Nothing runs.")
            return
        print_running_tasks(runtime, settings.worker.soft_shutdown)
        # Redis stays until the others have gone, because workers hand back to it.
        runtime.stop_application(settings)
        print_queued_tasks(runtime)
        runtime.stop()
        print("Stopped; 'make up' goes on where it was.")


def print_running_tasks(runtime: Runtime, limit: int) -> None:
    """Print how many tasks are waited for, and for how many seconds."""
    try:
        running = describe_running(ask(runtime))
        print(f"{running}; waiting for them, up to {limit} s …" if running else "No task runs.")
    except CommandError as error:
        terminal.print_warning(f"the tasks that run could not be counted: {error}")


def print_queued_tasks(runtime: Runtime) -> None:
    """Print what stays queued; Redis still runs."""
    try:
        queued = f"Still queued: {describe_queued(ask(runtime))}."
    except CommandError as error:
        queued = f"What stays queued could not be read: {error}."
    print(f"Workers have stopped. {queued}")


def down() -> None:
    """Stop everything and remove what runs; data stays."""
    with lock_checkout():
        require_runtime(load_or_defaults()).remove(with_data=False)
    print("Removed what ran; the data is kept, and 'make up' goes on with it.")


def clean(yes: bool) -> None:
    """Remove what runs and all data; CommandError when nobody can be asked, or the answer is not yes."""
    with lock_checkout():
        runtime = require_runtime(load_or_defaults())
        what = "this deletes all queued tasks and results"
        if not yes and not sys.stdin.isatty():
            raise CommandError(f"{what}, and nobody can be asked: run 'make clean YES=1'")
        if not yes and input(f"{what.capitalize()} for ever. Type yes to go on: ") != "yes":
            raise CommandError("nothing was deleted")
        runtime.remove(with_data=True)
        # With the data gone, the next `make up` is free to choose again.
        paths.RUNTIME_FILE.unlink(missing_ok=True)
    print("Removed what ran and all data; .env is kept.")
