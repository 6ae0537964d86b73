"""python -m services.commands.check: is everything right that workers and beat will import? What `make up` asks first.

Each mistake is a line on standard error, with file and line. Neither Redis nor anything else of the stack is needed.
Exit codes: 0 all is right, 2 it is not.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("config", "services")
SCHEDULE = "services/schedule.py"
# Heavy tasks take a minute to be imported; two are a module that waits for something.
LIMIT_SECONDS = 120
MISTAKE_EXIT_CODE = 2
# Where files are that nobody here has written.
FOREIGN = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Mistake(Exception):
    """Something is wrong; the sentence says what and where."""


def check() -> None:
    """Raise Mistake unless the source compiles, every module with tasks can be imported, and beat's entries are right.

    Raises ConfigError for a mistake in the settings.
    """
    for path in sorted(file for package in SOURCE for file in (ROOT / package).rglob("*.py")):
        with told(path=path):
            # Compiles only what has changed since it was last imported.
            SourceFileLoader(path.stem, str(path)).get_code(path.stem)
    with told():
        from config import load
        from services.broker.client import require_tls_files
        from services.schedule import beat_schedule
        from services.task_modules import task_modules

        # services/app.py would end the process with these mistakes.
        settings = load()
        beat_schedule(settings.beat.schedule)
        require_tls_files(settings)
        from services.app import app
    for name in task_modules(app.settings.tasks.imports):
        with told(f"{name} cannot be imported: "):
            importlib.import_module(name)
    with told():
        app.loader.import_default_modules()
        app.finalize()
        # A module may have changed them; this connects to nothing.
        app.amqp.Connection(app.conf.broker_url, transport_options=app.conf.broker_transport_options)
    for name, entry in app.conf.beat_schedule.items():
        if problem := mistake_in(app, name, entry):
            raise Mistake(f"{SCHEDULE}{line_of(name)}: the entry {name!r} {problem}")


def mistake_in(app: Any, name: str, entry: Any) -> str:
    """What is wrong with an entry of the schedule; "" for nothing."""
    from celery.schedules import BaseSchedule
    from redbeat.schedulers import RedBeatSchedulerEntry

    from services.beat.entries import encode, is_reserved

    try:
        period = entry.get("schedule")
        if not isinstance(period, (int, float, timedelta, BaseSchedule)):
            return f"has the schedule {period!r}, which is neither a number of seconds nor a crontab"
        made = RedBeatSchedulerEntry(**dict(entry, name=name, app=app))
        # As it is kept in Redis, and when it is due.
        encode([made.schedule, made.args, made.kwargs, made.options, made.due_at])
    except Exception as error:
        return f"cannot be used: {said(error)}"
    if is_reserved(made):
        return "has a name that beat needs for itself"
    if made.task not in app.tasks:
        return f"sends {made.task!r}, a task that no module defines"
    return ""


def line_of(name: str) -> str:
    """Where an entry of the schedule is written."""
    lines = (ROOT / SCHEDULE).read_text(encoding="utf-8").splitlines()
    found = (number for number, line in enumerate(lines, 1) if line.strip().startswith((f'"{name}"', f"'{name}'")))
    return next((f" line {number}" for number in found), "")


@contextmanager
def told(what: str = "", path: Path | None = None) -> Iterator[None]:
    """Raise Mistake, with the place, for whatever is raised inside; a module may raise anything, and end Python."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        from config import ConfigError

        if isinstance(error, ConfigError):
            raise
        place = place_of(error) or (shown(path) if path else "")
        raise Mistake(f"{place}: {said(error)}" if place else f"{what}{said(error)}") from error


def place_of(error: BaseException) -> str:
    """File and line of what is wrong: in a file that does not compile, else the last line of somebody's own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(Path(error.filename))} line {error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in frames if is_own(name)]
    return f"{shown(Path(own[-1][0]))} line {own[-1][1]}" if own else ""


def is_own(file: str) -> bool:
    """Whether a file is neither Python's, nor a package's, nor this one."""
    return file != __file__ and not file.startswith(("<", *FOREIGN))


def shown(path: Path) -> str:
    """A path as one types it in the checkout."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def said(error: BaseException) -> str:
    """What an exception says, in a line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")


def run_out(*_: object) -> None:
    raise TimeoutError(f"importing it takes longer than {LIMIT_SECONDS} s")


def main() -> int:
    """Check, and say what is wrong; the exit code."""
    signal.signal(signal.SIGALRM, run_out)
    signal.alarm(LIMIT_SECONDS)
    try:
        check()
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE_EXIT_CODE
    except Exception as error:
        # ConfigError, which cannot be imported where config/ has mistakes.
        for problem in getattr(error, "problems", [said(error)]):
            print(f"error: {problem}", file=sys.stderr)
        return MISTAKE_EXIT_CODE
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A module may have started a thread that never ends.
    os._exit(code)
