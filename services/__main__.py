"""python -m services call | status | schedule | dead-letters | replay | purge-dead-letters | to-plain.

What `make` runs inside the stack. Each prints for people, or one JSON object with --json; `call` always prints JSON.
Exit codes: 0 good (call: SUCCESS), 1 the task failed, Redis does not answer or refuses, or there is no such dead
letter, 2 bad input, 3 no result in time.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import click
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from config import ConfigError
from services.commands import call, dead_letters, output, schedule, status
from services.delayed import to_plain

GOOD, FAILED, BAD_INPUT = 0, 1, 2

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
all_option = click.option("--all", "everything", is_flag=True, help="All that there are.")


def run(command: Callable[[Celery], dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool) -> NoReturn:
    """Print what `command` returns, with `show` or as JSON, and exit.

    An "error" in it, which is exit code 1, is a sentence on standard error too; so are bad input and settings.
    """
    from services.app import app

    try:
        found = command(app)
        code = FAILED if "error" in found else GOOD
    except (output.BadInput, ConfigError) as error:
        found, code = {"error": str(error)}, BAD_INPUT
    except (RedisError, OperationalError, OSError) as error:
        found, code = {"error": f"Redis does not answer: {error}"}, FAILED
    if as_json:
        output.print_json(found)
    elif code == GOOD:
        show(found)
    for line in found.get("error", "").splitlines():
        output.print_error(line)
    sys.stdout.flush()
    sys.exit(code)


@click.group(help="Send a task, look at the stack, and see to dead letters.")
def main() -> None:
    pass


@main.command("call", help="Send TASK, wait for it and print its result as JSON.")
@click.argument("task")
@click.option("--args", "arguments", default="[]", help="JSON list of positional arguments.")
@click.option("--kwargs", "keywords", default="{}", help="JSON object of keyword arguments.")
@click.option("--wait", default="30", help="Seconds to wait for the result.")
def call_command(task: str, arguments: str, keywords: str, wait: str) -> None:
    from services.app import app

    answer, code = call.call(app, task, arguments, keywords, wait)
    output.print_json(answer)
    sys.stdout.flush()
    sys.exit(code)


@main.command("status", help="Print nodes, queue lengths and beat's last tick.")
@click.option("--starting", is_flag=True, help="Say of a queue that nobody reads that a worker is starting.")
@json_option
def status_command(starting: bool, as_json: bool) -> None:
    run(status.read_status, partial(status.print_status, starting=starting), as_json)


@main.command("schedule", help="Print every entry of beat's schedule: what is sent, how often, and when next.")
@json_option
def schedule_command(as_json: bool) -> None:
    run(schedule.read_schedule, schedule.print_schedule, as_json)


@main.command("dead-letters", help="Print the latest dead letters, or all there is of the one with this ID.")
@click.argument("words", metavar="[ID]", nargs=-1)
@all_option
@json_option
def dead_letters_command(words: tuple[str, ...], everything: bool, as_json: bool) -> None:
    run(lambda app: dead_letters.find(app, words, everything), dead_letters.print_found, as_json)


@main.command("replay", help="Put dead letters back into their queues.")
@click.argument("words", metavar="[ID]...", nargs=-1)
@all_option
@json_option
def replay_command(words: tuple[str, ...], everything: bool, as_json: bool) -> None:
    run(lambda app: dead_letters.replay(app, words, everything), dead_letters.print_replayed, as_json)


@main.command("purge-dead-letters", help="Delete all dead letters.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def purge_dead_letters_command(yes: bool, as_json: bool) -> None:
    run(lambda app: dead_letters.purge(app, yes), dead_letters.print_purged, as_json)


@main.command("to-plain", help="Put back into plain queues what only Stalk's workers understand.")
@json_option
def to_plain_command(as_json: bool) -> None:
    run(to_plain.to_plain, to_plain.print_moved, as_json)


if __name__ == "__main__":
    main(prog_name="python -m services")
