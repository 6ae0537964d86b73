"""python -m services.commands.check: import all that workers and beat will import, before `make up` starts them.

Each mistake is a line on standard error, with file and line. Neither Redis nor anything else of the stack is needed.
Exit codes: 0 no mistake, 2 a mistake.
"""

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
# Modules that import much take a minute; one that takes two waits for something.
LIMIT_SECONDS = 120
MISTAKE_EXIT_CODE = 2
# Where Python and installed packages are: a mistake is looked for in the files of this checkout.
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Mistake(Exception):
    """Something cannot be imported or used; the sentence says what, and where it is written."""


def check() -> None:
    """Raise Mistake unless the source compiles, every module with tasks can be imported, and beat's entries are right.

    Raises ConfigError for a mistake in the settings.
    """
    for path in sorted(file for package in SOURCE for file in (ROOT / package).rglob("*.py")):
        with locate_mistakes(path=path):
            # Compiles only what has changed since it was last imported.
            SourceFileLoader(path.stem, str(path)).get_code(path.stem)
    with locate_mistakes():
        from config import load
        from services.broker.client import require_tls_files
        from services.schedule import beat_schedule
        from services.task_modules import find_task_modules

        # services/app.py would exit at one of these mistakes.
        settings = load()
        beat_schedule(settings.beat.schedule)
        require_tls_files(settings)
        from services.app import app
    for name in find_task_modules(app.settings.tasks.imports):
        with locate_mistakes(f"{name} cannot be imported: "):
            importlib.import_module(name)
    with locate_mistakes():
        app.loader.import_default_modules()
        app.finalize()
        # A module may have changed the options, which kombu checks here; this connects to nothing.
        app.amqp.Connection(app.conf.broker_url, transport_options=app.conf.broker_transport_options)
    for name, entry in app.conf.beat_schedule.items():
        if problem := find_mistake(app, name, entry):
            raise Mistake(f"{SCHEDULE}{find_line(name)}: the entry {name!r} {problem}")


def find_mistake(app: Any, name: str, entry: Any) -> str:
    """What is wrong with an entry of beat's schedule; "" for nothing."""
    from celery.schedules import BaseSchedule
    from redbeat.schedulers import RedBeatSchedulerEntry

    from services.beat.entries import encode, is_reserved

    try:
        period = entry.get("schedule")
        if not isinstance(period, (int, float, timedelta, BaseSchedule)):
            return f"has the schedule {period!r}, which is neither a number of seconds nor a crontab"
        item = RedBeatSchedulerEntry(**dict(entry, name=name, app=app))
        # Beat stores these in Redis as JSON, and computes from the schedule when the entry is due.
        encode([item.schedule, item.args, item.kwargs, item.options, item.due_at])
    except Exception as error:
        return f"cannot be used: {describe(error)}"
    if is_reserved(item):
        return "has a name that beat needs for itself"
    if item.task not in app.tasks:
        return f"sends {item.task!r}, a task that no module defines"
    return ""


def find_line(name: str) -> str:
    """The line of services/schedule.py that begins an entry."""
    lines = (ROOT / SCHEDULE).read_text(encoding="utf-8").splitlines()
    found = (number for number, line in enumerate(lines, 1) if line.strip().startswith((f'"{name}"', f"'{name}'")))
    return next((f" line {number}" for number in found), "")


@contextmanager
def locate_mistakes(what: str = "", path: Path | None = None) -> Iterator[None]:
    """Raise Mistake, with file and line, for whatever is raised inside: a module may raise anything, SystemExit too."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        from config import ConfigError

        if isinstance(error, ConfigError):
            raise
        place = find_place(error) or (relative(path) if path else "")
        raise Mistake(f"{place}: {describe(error)}" if place else f"{what}{describe(error)}") from error


def find_place(error: BaseException) -> str:
    """File and line of an error: where a file does not compile, else the last line of the traceback in the checkout."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{relative(Path(error.filename))} line {error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in frames if is_own(name)]
    return f"{relative(Path(own[-1][0]))} line {own[-1][1]}" if own else ""


def is_own(file: str) -> bool:
    """Whether a file belongs neither to Python, nor to an installed package, nor is this one."""
    return file != __file__ and not file.startswith(("<", *INSTALLED))


def relative(path: Path) -> str:
    """A path relative to the checkout, where it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def describe(error: BaseException) -> str:
    """Type and text of an exception, on one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")


def raise_timeout(*_: object) -> None:
    raise TimeoutError(f"importing it takes longer than {LIMIT_SECONDS} s")


def main() -> int:
    """Check, print what is wrong, and return the exit code."""
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(LIMIT_SECONDS)
    try:
        check()
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE_EXIT_CODE
    except Exception as error:
        # ConfigError has several; it cannot be imported where config/ itself has mistakes.
        for problem in getattr(error, "problems", [describe(error)]):
            print(f"error: {problem}", file=sys.stderr)
        return MISTAKE_EXIT_CODE
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit, which would wait for a thread that a module has started and that never ends.
    os._exit(code)
