"""python -m services.commands.check: mistakes in what workers and beat are about to import, with file and line."""

from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab

from config import load
from services.commands.check import find_mistake
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.unit.refusals import run_refused

OWN, SHOP, SCHEDULE = "services/tasks/own.py", "shop/tasks.py", "services/schedule.py"
IMPORTS = {"CELERY_IMPORTS": "shop.tasks"}
THREAD = "__import__('threading').Thread(target=__import__('time').sleep, args=[3600]).start()"
GOOD = {"task": "services.tasks.disk.report_free_space", "schedule": 300.0}


def check(checkout: Checkout, **settings: str) -> list[str]:
    """The mistakes, a line each."""
    return run_refused(checkout, "-m", "services.commands.check", **settings)


def test_nothing_is_wrong_with_the_checkout_and_no_redis_is_needed(checkout: Checkout) -> None:
    done = checkout.run("-m", "services.commands.check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "text", "settings", "says"),
    [
        (OWN, "import json\ndef broken(:\n", {}, f"{OWN} line 2: SyntaxError: invalid syntax"),
        (OWN, "import json\n\njson.loads('[')\n", {}, f"{OWN} line 3: JSONDecodeError: Expecting value"),
        (OWN, f"import sys\n{THREAD}\nsys.exit('so')\n", {}, f"{OWN} line 3: SystemExit: so"),
        (SHOP, "x = 1\nraise ValueError('of\\ntwo lines')\n", IMPORTS, f"{SHOP} line 2: ValueError: of two lines"),
        (
            "shop/orders.py",
            "",
            IMPORTS,
            "shop.tasks cannot be imported: ModuleNotFoundError: No module named 'shop.tasks'",
        ),
        (SCHEDULE, "ENTRIES = {\n", {}, f"{SCHEDULE} line 1: SyntaxError: '{{' was never closed"),
        (
            "own.py",
            "",
            {"BEAT_SCHEDULE": "nightly=60"},
            "BEAT_SCHEDULE: found entry 'nightly'; allowed: report-free-space",
        ),
    ],
    ids=["syntax", "import", "exit and thread", "own package", "no such module", "schedule", "BEAT_SCHEDULE"],
)
def test_a_mistake_is_one_line_with_its_place(
    own_checkout: Checkout, file: str, text: str, settings: dict[str, str], says: str
) -> None:
    (own_checkout.path / file).parent.mkdir(exist_ok=True)
    own_checkout.write(file, text)
    (mistake,) = check(own_checkout, **settings)
    assert mistake.startswith(f"error: {says}")


def test_an_entry_of_the_schedule_is_found_by_its_line(own_checkout: Checkout) -> None:
    path = own_checkout.path / "services" / "schedule.py"
    path.write_text(path.read_text().replace("disk.report_free_space", "disk.report"))
    line = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if '"report-free' in line)
    assert check(own_checkout) == [
        f"error: services/schedule.py line {line}: the entry 'report-free-space' sends "
        "'services.tasks.disk.report', a task that no module defines"
    ]


@pytest.fixture(scope="module")
def app() -> Celery:
    """The application, with its tasks."""
    app = create_app(load({}))
    app.loader.import_default_modules()
    return app


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
def test_an_entry_that_beat_could_not_use_is_refused(app: Celery, changes: dict[str, Any], says: str) -> None:
    mistake = find_mistake(app, "name", GOOD | changes)
    assert mistake.startswith(says)
    assert bool(mistake) == bool(says)


def test_an_entry_with_the_name_of_beats_lock_is_refused(app: Celery) -> None:
    assert find_mistake(app, "lock", GOOD) == "has a name that beat needs for itself"
