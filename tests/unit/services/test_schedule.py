"""services.schedule"""

import copy
import importlib

import pytest
from celery.schedules import crontab

from config import ConfigError, load
from services.schedule import ENTRIES, beat_schedule, set_period
from tests.support.checkout import Checkout
from tests.unit.refusals import run_refused

EVERY = tuple(ENTRIES)
# An entry for the tests, which hold whatever entries a user adds.
ONE = "probe"


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENTRIES, ONE, {"task": "probe", "schedule": 300.0, "options": {"expires": 300.0}})


def change_schedule(text: str) -> dict[str, dict[str, object]]:
    """Build the schedule with BEAT_SCHEDULE set to `text`."""
    return beat_schedule(load({"BEAT_SCHEDULE": text}).beat.schedule)


def test_without_changes_the_schedule_is_the_one_in_the_code() -> None:
    assert beat_schedule(()) == ENTRIES


@pytest.mark.parametrize("entry", EVERY)
def test_every_entry_names_a_task_that_exists_and_can_be_changed(entry: str) -> None:
    before = copy.deepcopy(ENTRIES)
    module, _, name = ENTRIES[entry]["task"].rpartition(".")
    assert getattr(importlib.import_module(module), name).name == ENTRIES[entry]["task"]
    assert change_schedule(f"{entry}=off").keys() == ENTRIES.keys() - {entry}
    assert change_schedule(f"{entry}=60")[entry]["schedule"] == 60.0
    weekdays = crontab(minute="30", hour="3", day_of_week="mon-fri")
    assert change_schedule(f"{entry}=30 3 * * mon-fri")[entry]["schedule"] == weekdays
    assert before == ENTRIES


def test_a_run_that_waited_for_longer_than_its_period_is_dropped() -> None:
    entry = {"task": "a", "schedule": 300.0, "options": {"expires": 300.0, "queue": "slow"}}
    assert set_period(entry, "60")["options"] == {"expires": 60.0, "queue": "slow"}
    assert set_period({"task": "a", "schedule": 300.0}, "60")["options"] == {}


@pytest.mark.parametrize(
    ("text", "period"),
    [(f"{ONE}=off; {ONE}=60", 60.0), (f"{ONE}=60; {ONE}=off", None), (f"{ONE}=60; {ONE}=90", 90.0)],
)
def test_the_last_change_of_an_entry_counts(text: str, period: float | None) -> None:
    assert change_schedule(text).get(ONE, {}).get("schedule") == period


@pytest.mark.parametrize(
    "period",
    ["99 * * * *", "a b c d e", "*/0 * * * *", "5,, * * * *", "0 0 31 2 *", "60-0 * * * *", "* * * * 1-"],
)
def test_a_crontab_that_cannot_be_read_is_refused_with_its_entry(period: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        change_schedule(f"{ONE}={period}")
    (problem,) = refusal.value.problems
    assert problem.startswith(f"BEAT_SCHEDULE: the crontab {period!r} of {ONE} cannot be read (")


def test_all_mistakes_are_reported_at_once_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as refusal:
        change_schedule(f"nightly=off; {ONE}=99 * * * *; hourly=60")
    unknown, unreadable, other = refusal.value.problems
    assert unknown == f"BEAT_SCHEDULE: found entry 'nightly'; allowed: {', '.join(sorted(ENTRIES))}"
    assert f"of {ONE} cannot be read" in unreadable
    assert "'hourly'" in other


@pytest.mark.parametrize("installed", [False, True], ids=["without ephem", "with ephem"])
@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("-m services.commands.check", "schedule.py"),
        ("-m services.launch worker", "schedule.py"),
        ("-m services.launch beat", "schedule.py"),
        ("-m celery -A services.app worker", "schedule.py"),
        ("-m celery -A services.app worker", "tasks/own.py"),
    ],
)
def test_a_solar_schedule_is_refused_in_one_sentence_that_says_what_to_write(
    own_checkout: Checkout, command: str, place: str, installed: bool
) -> None:
    with (own_checkout.path / "services" / place).open("a") as module:
        module.write("\nfrom celery.schedules import solar\nDUSK = solar('sunset', 52.5, lon=13.4)\n")
    if installed:
        # Celery only checks that ephem can be imported.
        own_checkout.write("ephem.py", "")
    urls = {"CELERY_BROKER_URL": "redis://127.0.0.1:1", "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/1"}
    (sentence,) = run_refused(own_checkout, *command.split(), **urls)
    assert "rror: solar('sunset', 52.5, lon=13.4): beat keeps its schedule in Redis" in sentence
    assert sentence.endswith("write a crontab in its place")
