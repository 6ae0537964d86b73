"""python -m services call | status: what `make call` and `make status` run inside the stack.

Both print one JSON object on standard output and nothing else. Exit codes: 0 good (call: SUCCESS), 1 the task
failed or Redis does not answer, 2 bad input, 3 no result in time.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import orjson

from services import call as calling
from services import status as state


def show(answer: Any) -> None:
    """Print one JSON object."""
    try:
        text = orjson.dumps(answer, default=str)
    except TypeError:
        # orjson has no whole numbers beyond 64 bits; Python's own would print NaN for what JSON calls null.
        text = json.dumps(answer, default=str).encode()
    sys.stdout.buffer.write(text + b"\n")
    sys.stdout.flush()


@click.group(help="Send a task, or look at the stack.")
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


if __name__ == "__main__":
    main(prog_name="python -m services")
