"""python -m services.commands.check: mistakes in what workers and beat are about to import, with file and line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from celery.schedules import crontab

from config import load
from services.commands.check import find_mistake
from tests.support.application import create_app
from tests.support.checkout import Checkout

# Importing the application takes a second on an idle machine.
SECONDS = 120
GOOD = {"task": "services.tasks.disk.report_free_space", "schedule": 300.0}


def check(checkout: Checkout, **settings: str) -> list[str]:
    """What is wrong: nothing, or the lines on standard error with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "services.commands.check"],
        cwd=checkout.path,
        env={"LANG": "C.UTF-8", **settings},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    said = done.stderr.splitlines()
    assert done.returncode == (2 if said else 0), done
    return said


def test_nothing_is_wrong_with_the_checkout_and_no_redis_is_needed(checkout: Checkout) -> None:
    assert check(checkout) == []


@pytest.mark.parametrize(
    ("file", "text", "settings", "says"),
    [
        (
            "services/tasks/own.py",
            "import json\ndef broken(:\n",
            {},
            "error: services/tasks/own.py line 2: SyntaxError: invalid syntax",
        ),
        (
            "services/tasks/own.py",
            "import json\n\njson.loads('{')\n",
            {},
            "error: services/tasks/own.py line 3: JSONDecodeError: Expecting property name enclosed in double quotes",
        ),
        (
            "services/tasks/own.py",
            "import sys, threading, time\nthreading.Thread(target=time.sleep, args=[3600]).start()\nsys.exit('so')\n",
            {},
            "error: services/tasks/own.py line 3: SystemExit: so",
        ),
        (
            "shop/tasks.py",
            "x = 1\nraise ValueError('of\\ntwo lines')\n",
            {"CELERY_IMPORTS": "shop.tasks"},
            "error: shop/tasks.py line 2: ValueError: of two lines",
        ),
        (
            "shop/tasks.py",
            "",
            {"CELERY_IMPORTS": "shop.task"},
            "error: shop.task cannot be imported: ModuleNotFoundError: No module named 'shop.task'",
        ),
        (
            "services/schedule.py",
            "ENTRIES = {\n",
            {},
            "error: services/schedule.py line 1: SyntaxError: '{' was never closed",
        ),
        (
            "own.py",
            "",
            {"BEAT_SCHEDULE": "nightly=60"},
            "error: BEAT_SCHEDULE: found entry 'nightly'; allowed: report-free-space",
        ),
    ],
    ids=["syntax", "import", "exit and thread", "own package", "no such module", "schedule", "BEAT_SCHEDULE"],
)
def test_a_mistake_is_one_line_with_its_place(
    own_checkout: Checkout, file: str, text: str, settings: dict[str, str], says: str
) -> None:
    (own_checkout.path / file).parent.mkdir(exist_ok=True)
    own_checkout.write(file, text)
    (said,) = check(own_checkout, **settings)
    assert said.startswith(says)


def test_an_entry_of_the_schedule_is_found_by_its_line(own_checkout: Checkout) -> None:
    path = own_checkout.path / "services" / "schedule.py"
    path.write_text(path.read_text().replace("disk.report_free_space", "disk.report"))
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if '"report-free' in line)
    assert check(own_checkout) == [
        f"error: services/schedule.py line {line}: the entry 'report-free-space' sends "
        "'services.tasks.disk.report', a task that no module defines"
    ]


@pytest.fixture(scope="module")
def mistake() -> Callable[[Any], str]:
    """What is wrong with an entry."""
    app = create_app(load({}))
    app.loader.import_default_modules()
    return lambda entry: find_mistake(app, "name", entry)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"args": (["/tmp"],), "kwargs": {}, "options": {"queue": "io"}, "enabled": False}, ""),
        ({"schedule": crontab(minute={0, 30}, hour=range(0, 24, 5), day_of_week=frozenset([1]))}, ""),
        ({"task": "no.such"}, "sends 'no.such', a task that no module defines"),
        ({"schedule": "hourly"}, "has the schedule 'hourly', which is neither a number of seconds nor a crontab"),
        ({"schedule": None}, "has the schedule None, which is neither a number of seconds nor a crontab"),
        ({"schedule": crontab(minute=[])}, "cannot be used: ValueError: the crontab <crontab: [] "),
        ({"schedule": crontab(hour=[])}, "cannot be used: ValueError: "),
        ({"schedule": crontab(day_of_week=[])}, "cannot be used: ValueError: "),
        ({"every": 5}, "cannot be used: TypeError: "),
        ({"args": ({1, 2},)}, "cannot be used: TypeError: "),
    ],
)
def test_an_entry_that_beat_could_not_use_is_refused(
    mistake: Callable[[Any], str], changes: dict[str, Any], says: str
) -> None:
    said = mistake(GOOD | changes)
    assert said.startswith(says)
    assert bool(said) == bool(says)


def test_an_entry_with_the_name_of_beats_lock_is_refused() -> None:
    app = create_app(load({}))
    app.loader.import_default_modules()
    assert find_mistake(app, "lock", GOOD) == "has a name that beat needs for itself"
