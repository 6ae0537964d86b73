"""python -m services call | status | schedule | dead-letters | replay | purge-dead-letters | to-plain.

This is what make runs inside. Each prints one JSON object on standard output and nothing else. Exit codes: 0 good
(call: SUCCESS), 1 the task failed, Redis does not answer or refuses, or there is no such dead letter, 2 bad input, 3 no
result in time.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import orjson

from config import ConfigError
from services.commands import call as calling
from services.commands import status as state
from services.dead_letters import store as letters
from services.delayed import to_plain as rollback


def show(answer: Any) -> None:
    """Print one JSON object."""
    try:
        text = orjson.dumps(answer, default=str)
    except TypeError:
        # orjson has no whole numbers beyond 64 bits; Python's own would print NaN for what JSON calls null.
        text = json.dumps(answer, default=str).encode()
    sys.stdout.buffer.write(text + b"\n")
    sys.stdout.flush()


def end(answered: tuple[dict[str, Any], int]) -> None:
    """Print the answer and leave with its exit code."""
    show(answered[0])
    sys.exit(answered[1])


class Commands(click.Group):
    """Commands that answer with JSON also when the settings are at fault."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            return end(({"error": str(error)}, calling.BAD_INPUT))


@click.group(cls=Commands, help="Send a task, look at the stack, and see to what goes no further.")
def main() -> None:
    pass


@main.command(help="Send TASK, wait for it and print its result as JSON.")
@click.argument("task")
@click.option("--args", "arguments", default="[]", help="JSON list of positional arguments.")
@click.option("--kwargs", "keywords", default="{}", help="JSON object of keyword arguments.")
@click.option("--wait", default="30", help="Seconds to wait for the result.")
def call(task: str, arguments: str, keywords: str, wait: str) -> None:
    from services.app import app

    answer, code = calling.call(app, task, arguments, keywords, wait)
    show(answer)
    sys.exit(code)


@main.command(help="Print nodes, queue lengths and beat's last tick as JSON.")
def status() -> None:
    from services.app import app

    answer, code = state.status(app)
    show(answer)
    sys.exit(code)


@main.command(help="Print every entry of beat's schedule as JSON: what is sent, how often, and when next.")
def schedule() -> None:
    from services.app import app
    from services.beat import entries

    end(entries.list_entries(app))


@main.command("dead-letters", help="Print the latest dead letters as JSON, or all there is of the one with this ID.")
@click.argument("number", metavar="[ID]", type=int, required=False)
@click.option("--all", "everything", is_flag=True, help="All, not only the latest.")
def dead_letters(number: int | None, everything: bool) -> None:
    from services.app import app

    end(letters.listed(app, everything) if number is None else letters.shown(app, number))


@main.command(help="Put dead letters back into their queues.")
@click.argument("numbers", metavar="[ID]...", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that there are.")
def replay(numbers: tuple[int, ...], everything: bool) -> None:
    from services.app import app

    if bool(numbers) == everything:
        raise click.UsageError("say which: an ID, several, or --all")
    end(letters.replay(app, None if everything else sorted(set(numbers))))


@main.command("purge-dead-letters", help="Delete all dead letters.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge_dead_letters(yes: bool) -> None:
    from services.app import app

    if not yes and not sys.stdin.isatty():
        raise click.UsageError("this deletes all dead letters, and nobody can be asked: say --yes")
    if not yes and not click.confirm("Delete all dead letters, for ever?", err=True):
        end(({"purged": 0, "error": "nothing was deleted"}, letters.BAD))
    end(letters.purge(app))


@main.command("to-plain", help="Put back into plain queues what only Stalk's workers understand.")
def to_plain() -> None:
    from services.app import app

    end(rollback.to_plain(app))


if __name__ == "__main__":
    main(prog_name="python -m services")
