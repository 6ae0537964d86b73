"""`dead-letters`, `replay` and `purge-dead-letters`: what is typed, and what is printed."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import click
from celery import Celery

from services.commands.output import BOLD, RED, YELLOW, BadInput, print_table
from services.dead_letters import store

HEADER = ("ID", "When", "Reason", "Task", "Task ID", "Queue", "Deliveries", "Detail")
# The reasons that say something of the stack or of a sender, not of a task.
ALARMING = ("crashed", "undecodable", "unknown-task")


def find(app: Celery, words: Sequence[str], everything: bool) -> dict[str, Any]:
    """The latest dead letters, all of them, or the one whose id was typed.

    Raises BadInput.
    """
    ids = parse_ids(words)
    if len(ids) > 1:
        raise BadInput(f"ID: found {' '.join(words)!r}; it must be one number, such as 7")
    return store.read(app, ids[0]) if ids else store.list_latest(app, everything)


def replay(app: Celery, words: Sequence[str], everything: bool) -> dict[str, Any]:
    """Put the dead letters whose ids were typed, or all, back into their queues.

    Raises BadInput.
    """
    ids = parse_ids(words)
    if bool(ids) == everything:
        raise BadInput("say which dead letters: make replay ID=7, or ID=7,9, or ALL=1 for all")
    return store.replay(app, None if everything else sorted(set(ids)))


def purge(app: Celery, yes: bool) -> dict[str, Any]:
    """Delete all dead letters, after asking.

    Raises BadInput when nobody can be asked.
    """
    if not yes and not sys.stdin.isatty():
        raise BadInput(
            "this deletes all dead letters, and nobody can be asked: run 'make purge-dead-letters YES=1', or this "
            "command with --yes"
        )
    question = "This deletes all dead letters for ever. Type yes to go on"
    if not yes and click.prompt(question, default="", show_default=False, err=True) != "yes":
        return {"purged": 0, "error": "nothing was deleted"}
    return store.purge(app)


def parse_ids(words: Sequence[str]) -> list[int]:
    """Ids as they are typed: 7, or 7,9, or 7 9.

    Raises BadInput.
    """
    text = " ".join(words)
    ids = [one for one in re.split(r"[\s,]+", text) if one]
    if not all(re.fullmatch(r"[0-9]{1,18}", one) for one in ids):
        raise BadInput(
            f"ID: found {text!r}; it must be the number of a dead letter, such as 7: see 'make dead-letters'"
        )
    return [int(one) for one in ids]


def print_found(found: dict[str, Any]) -> None:
    """Print a list of dead letters with a line each, or one with a line for each of its fields."""
    if "dead_letters" not in found:
        _print_one(found)
    elif not found["dead_letters"]:
        print("There are no dead letters.")
    else:
        print_table(map(_make_row, found["dead_letters"]), header=HEADER)
        if found["more"]:
            print(f"{found['more']} older ones are not shown: make dead-letters ALL=1")


def print_replayed(found: dict[str, Any]) -> None:
    print(f"{_describe_count(len(found['replayed']))} back in the queues.")


def print_purged(found: dict[str, Any]) -> None:
    print(f"{_describe_count(found['purged'])} deleted.")


def _describe_count(number: int) -> str:
    return f"{number} dead letter{' is' if number == 1 else 's are'}"


def _make_row(one: dict[str, Any]) -> list[Any]:
    reason = (one["reason"], _choose_style(one["reason"]))
    named = [one["task"] or "-", one["task_id"] or "-", one["queue"], str(one["deliveries"])]
    return [str(one["id"]), one["when"], reason, *named, " ".join(one["detail"].split())]


def _print_one(letter: dict[str, Any]) -> None:
    rows = []
    for name, value in letter.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if name == "priority" and value is not None:
            text += " (0 is the most urgent)"
        rows.append([(name, BOLD), (text, _choose_style(text) if name == "reason" else "")])
    print_table(rows)


def _choose_style(reason: str) -> str:
    return RED if reason in ALARMING else YELLOW
