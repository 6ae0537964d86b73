"""make dead-letters, replay, purge-dead-letters, to-plain: what goes no further, and the way back to stock workers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from stack import terminal
from stack.commands import status
from stack.errors import CommandError

if TYPE_CHECKING:
    from stack.runtime import Runtime

# Where nobody looks at a terminal, a letter is one line, however long its detail is.
LIST_WIDTH = 2000
REPLAY_HOW = "make replay ID=7, or ID=7,9, or ALL=1 for all"
# As services/delivery/unacked.py and lua/crash.lua name them: those that say that something is wrong with the stack
# or with a sender, not with a task.
ALARMING = ("crashed", "undecodable", "unknown-task")


def dead_letters(runtime: Runtime, number: str, everything: bool, as_json: bool) -> None:
    """Print the latest dead letters, all of them, or all there is of one.

    Raises CommandError.
    """
    command = ["dead-letters", *(["--all"] if everything else []), *map(str, ids(number))]
    if len(ids(number)) > 1:
        raise CommandError(f"ID: found {number!r}; it must be one number, such as 7")
    answer = status.answer(runtime, *command)
    if as_json:
        print(json.dumps(answer))
    elif number:
        _show(answer)
    else:
        _list(answer)


def replay(runtime: Runtime, number: str, everything: bool) -> None:
    """Put dead letters back into their queues.

    Raises CommandError.
    """
    numbers = ids(number)
    if bool(numbers) == everything:
        raise CommandError(f"say which dead letters: {REPLAY_HOW}")
    answer = status.answer(runtime, "replay", *(["--all"] if everything else map(str, numbers)))
    print(f"{_letters(len(answer['replayed']))} back in the queues.")


def purge(runtime: Runtime, yes: bool) -> None:
    """Delete all dead letters, after asking.

    Raises CommandError when nobody can be asked.
    """
    if not yes:
        terminal.confirm_deletion("dead letters", "make purge-dead-letters YES=1")
    answer = status.answer(runtime, "purge-dead-letters", "--yes")
    print(f"{_letters(answer['purged'])} deleted.")


def to_plain(runtime: Runtime) -> None:
    """Put back into plain queues what only Stalk's workers understand.

    Raises CommandError.
    """
    answer = status.answer(runtime, "to-plain")
    print(
        f"Back in the queues: {answer['scheduled']} tasks that waited for their time, {answer['restored']} of workers "
        "that are gone. Dead letters stay: see 'make dead-letters'."
    )


def ids(text: str) -> list[int]:
    """Ids as somebody types them: 7, or 7,9, or 7 9.

    Raises CommandError.
    """
    words = re.split(r"[\s,]+", text.strip()) if text.strip() else []
    if not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words):
        raise CommandError(
            f"ID: found {text!r}; it must be the number of a dead letter, such as 7: see 'make dead-letters'"
        )
    return [int(word) for word in words]


def _letters(count: int) -> str:
    return f"{count} dead letter{' is' if count == 1 else 's are'}"


def _list(answer: dict[str, Any]) -> None:
    screen = status.console(LIST_WIDTH)
    if not answer["dead_letters"]:
        screen.print("There are no dead letters.")
        return
    rows = status.table("ID", "When", "Reason", "Task", "Task ID", "Queue", "Deliveries", "Detail")
    for one in answer["dead_letters"]:
        words = [one["queue"], one["deliveries"], " ".join(one["detail"].split())]
        named = [one["task"] or "-", one["task_id"] or "-"]
        # Text, because rich takes brackets in plain strings for colours.
        cells = [Text(str(word)) for word in (one["id"], one["when"], one["reason"], *named, *words)]
        cells[2].style = _style(one["reason"])
        rows.add_row(*cells)
    screen.print(rows)
    if answer["more"]:
        screen.print(f"{answer['more']} older ones are not shown: make dead-letters ALL=1")


def _style(reason: str) -> str:
    return "red" if reason in ALARMING else "yellow"


def _show(answer: dict[str, Any]) -> None:
    rows = Table(box=None, pad_edge=False, show_header=False)
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in answer.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if name == "priority" and value is not None:
            shown += " (0 is the most urgent)"
        rows.add_row(name, Text(shown, style=_style(shown) if name == "reason" else ""))
    status.console(LIST_WIDTH).print(rows)
