"""python -m stack: what `make` runs on the host.

Exit codes: 0 done, 1 it failed, 2 the configuration or the call has a mistake; `call` and `services` have those of
services/__main__.py. make turns each of them but 0 into its own 2.
"""

import io
import sys

import click

import config
from config import exit_on_mistakes
from stack import env_file, readiness, terminal
from stack.checkout_lock import lock_checkout
from stack.commands.dev import dev
from stack.commands.lock import lock
from stack.commands.new_task import new_task
from stack.commands.status import status
from stack.commands.stop import clean, down, stop
from stack.commands.up import FIRST_TASK, up
from stack.env_file import load_or_defaults
from stack.errors import CommandError
from stack.runtime import find_runtime, require_runtime


@click.group(help="The host's side of the stack.")
def main() -> None:
    pass


main.command(help="Build, start and wait.")(up)
main.command(help="Up, with the source mounted; then restart nodes on every change.")(dev)
main.command("new-task", help="Write a task module to start from.")(click.argument("name")(new_task))
main.command(help="Units, nodes, queues and beat.")(
    click.option("--json", "as_json", is_flag=True, help="One JSON object.")(status)
)
main.command(help="Stop; running tasks finish first.")(stop)
main.command(help="Stop and remove what runs; data is kept.")(down)
main.command(help="Remove what runs and all data.")(click.option("--yes", is_flag=True)(clean))
main.command(help="Pin all packages.")(lock)


@main.command(help="Run a task inside the stack and print its result as JSON.")
@click.argument("task")
@click.argument("options", nargs=-1)
def call(task: str, options: tuple[str, ...]) -> None:
    if not task:
        raise CommandError(f"TASK is not set: {FIRST_TASK}")
    sys.exit(find_runtime(config.load()).show("call", *options, "--", task))


@main.command(help="Run so many workers.")
@click.argument("workers")
def scale(workers: str) -> None:
    if not workers.isdigit():
        raise CommandError(f"WORKERS: found {workers!r}; it must be a whole number, as in: make scale WORKERS=4")
    runtime = require_runtime(config.load())
    if not env_file.ENV_FILE.exists():
        raise CommandError("there is no .env yet: start the stack with 'make up' first")
    with lock_checkout():
        env_file.set_variables({"WORKERS": workers})
        runtime.scale(config.load())
    readiness.wait_until_healthy(runtime)
    print(f"{workers} workers run; .env says so too.")


# What follows the name is passed on as it is, options and -- too.
@main.command(help="Run `python -m services …` inside the stack.", context_settings={"allow_interspersed_args": False})
@click.argument("arguments", nargs=-1)
def services(arguments: tuple[str, ...]) -> None:
    sys.exit(find_runtime(load_or_defaults()).show(*arguments))


@main.command(help="Follow the logs.")
@click.argument("services", nargs=-1)
def logs(services: tuple[str, ...]) -> None:
    sys.exit(require_runtime(load_or_defaults()).follow_logs(services))


@main.command(help="Python with the app and its tasks.")
def shell() -> None:
    sys.exit(require_runtime(config.load()).run_shell())


def run() -> None:
    """Run the command line; every expected failure is a sentence on standard error."""
    # A file or a pipe gets each line at once too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        with exit_on_mistakes(terminal.print_error):
            main(prog_name="python -m stack")
    except CommandError as failure:
        terminal.print_error(str(failure))
        sys.exit(1)
    except PermissionError as denied:
        what = denied.filename or "a process of the stack"
        terminal.print_error(f"{what} belongs to another user: run make as the one who ran it first")
        sys.exit(1)


if __name__ == "__main__":
    run()
