"""Crontabs on days on which clocks change, compared with a reference that checks every minute by itself."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery.beat import ScheduleEntry
from celery.schedules import crontab
from hypothesis import given, settings
from hypothesis import strategies as st
from redbeat import RedBeatSchedulerEntry

from config import load
from services.beat import entries
from services.schedule import beat_schedule
from tests.support.application import create_app

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
# The nights in which each zone changes its clocks; Lord Howe by half an hour, with winter in July.
CHANGES = [
    ("Europe/Berlin", datetime(2026, 3, 29)),
    ("Europe/Berlin", datetime(2026, 10, 25)),
    ("America/New_York", datetime(2026, 3, 8)),
    ("America/New_York", datetime(2026, 11, 1)),
    ("Australia/Lord_Howe", datetime(2026, 4, 5)),
    ("Australia/Lord_Howe", datetime(2026, 10, 4)),
]
# A form takes a second a night, and more for a year: the other zones are slow tests.
NIGHTS = [change if "Berlin" in change[0] else pytest.param(*change, marks=pytest.mark.slow) for change in CHANGES]
ZONES = [
    "Europe/Berlin",
    *(pytest.param(zone, marks=pytest.mark.slow) for zone in ("America/New_York", "Australia/Lord_Howe")),
]
# Minute, hour, day of month, month, day of week, as BEAT_SCHEDULE has them.
FORMS = [
    *("* * * * *", "*/15 * * * *", "*/7 * * * *"),
    *("0 * * * *", "45 * * * *", "10,40 * * * *", "20-50/10 * * * *"),
    *("0 */2 * * *", "30 */3 * * *", "*/20 2 * * *", "*/10 1-3 * * *"),
    *("0 9 * * *", "0 0 * * *", "0 1 * * *", "30 1 * * *", "59 1 * * *", "0 2 * * *", "10 2 * * *", "15,45 2 * * *"),
    *("30 2 * * *", "0 3 * * *", "0,30 0-4 * * *", "0-59 1,2 * * *", "15 22-3 * * *", "0 0-23 * * *", "0 0-23/2 * * *"),
    *("30 2 * * sun", "30 2 * * sat,mon", "15 1-2 * * fri-mon"),
    *("30 2 1-8 * *", "30 2 */2 * *", "30 2 * mar-apr,oct-nov *", "30 2 * */3 *"),
    # Celery needs both days to match, Debian's cron one of them.
    *("15 1,2 1-7 * sun", "*/30 * 25-31 3,10 sunday"),
]
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
# Lowest and highest number, and names, of each field.
FIELDS: list[tuple[int, int, list[str]]] = [(0, 59, []), (0, 23, []), (1, 31, []), (1, 12, MONTHS), (0, 6, DAYS)]


# The reference.


def numbers(field: str, lowest: int, highest: int, names: Iterable[str]) -> set[int]:
    """The numbers that a field of a crontab allows."""
    known = {name: number for number, name in enumerate(names, lowest)}
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        ends = [known[end[:3]] if end[:3] in known else int(end) for end in (first, last or first) if end != "*"]
        allowed = list(range(lowest, highest + 1))
        if ends:
            start, end = ends
            turned = allowed[start - lowest :] + allowed[: start - lowest]
            allowed = turned[: turned.index(end) + 1]
        found |= set(allowed[:: int(step or 1)])
    return found


def expected(text: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """When a crontab runs after `start` and before `end`, by checking every minute."""
    allowed = [numbers(field, *limits) for field, limits in zip(text.split(), FIELDS, strict=True)]
    floats = any(field.startswith("*") for field in text.split()[:2])

    def matches(time: datetime) -> bool:
        shown = (time.minute, time.hour, time.day, time.month, time.isoweekday() % 7)
        return all(number in field for number, field in zip(shown, allowed, strict=True))

    found = []
    # A repeated hour was first shown within the last three hours.
    moment = start - 3 * HOUR
    before = latest = to_local(moment, zone) - MINUTE
    while moment < end:
        shown = to_local(moment, zone)
        skipped = (before + minutes * MINUTE for minutes in range(1, (shown - before) // MINUTE))
        runs = matches(shown) if floats else (shown > latest and matches(shown)) or any(map(matches, skipped))
        if runs and moment > start:
            found.append(moment)
        before, latest, moment = shown, max(latest, shown), moment + MINUTE
    return found


def to_local(moment: datetime, zone: str) -> datetime:
    return moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)


# Beat.


@cache
def application(zone: str) -> Any:
    return create_app(load({"CELERY_TIMEZONE": zone}))


class Beat:
    """Beat in a time zone, at a time."""

    def __init__(self, zone: str, now: datetime) -> None:
        self.app, self.now = application(zone), now
        self.app.now = lambda: self.now.astimezone(self.app.timezone)

    def entry(self, schedule: Any, **definition: Any) -> Any:
        return RedBeatSchedulerEntry(app=self.app, schedule=schedule, **{"name": "one", "task": "task", **definition})

    def runs(self, entry: Any, end: datetime) -> Iterator[datetime]:
        """When it sends an entry: it reads what is stored, when the stored score says."""
        kept, score = stored(entry), entry.score
        while True:
            # A tick is always slightly late.
            self.now = max(self.now, datetime.fromtimestamp(score, UTC)) + timedelta(seconds=0.3)
            if self.now >= end:
                return
            entry = entries.read(self.app, entry.key, kept)
            due, seconds = entry.is_due()
            if due:
                yield self.now.replace(second=0, microsecond=0)
                following = ScheduleEntry._next_instance(entry)
                kept, score = [kept[0], entries.encode_meta(following)], following.score
            else:
                self.now += timedelta(seconds=max(seconds, 1))


def stored(entry: Any) -> list[str]:
    """An entry as stored in Redis."""
    return [entries.encode({name: getattr(entry, name) for name in entries.DEFINITION}), entries.encode_meta(entry)]


def around(zone: str, night: datetime, before: timedelta, after: timedelta) -> tuple[datetime, datetime]:
    """`before` and `after` the midnight before a clock change."""
    midnight = night.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    return midnight - before, midnight + after


def assert_runs_as_expected(form: str, zone: str, start: datetime, end: datetime, **definition: Any) -> None:
    beat = Beat(zone, start)
    entry = beat.entry(**{"schedule": crontab.from_string(form), **definition})
    assert list(beat.runs(entry, end)) == expected(form, zone, start, end)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("zone", "night"), NIGHTS)
def test_a_crontab_runs_when_every_minute_says_that_it_should(zone: str, night: datetime, form: str) -> None:
    assert_runs_as_expected(form, zone, *around(zone, night, 8 * HOUR, 30 * HOUR))


def field(lowest: int, highest: int) -> st.SearchStrategy[str]:
    """Fields of a crontab, in all forms."""
    number = st.integers(lowest, highest).map(str)
    span = st.tuples(number, number).map("-".join)
    step = st.tuples(st.one_of(span, st.just("*")), st.integers(1, 12).map(str)).map("/".join)
    part = st.one_of(number, span, step)
    return st.one_of(st.just("*"), st.lists(part, min_size=1, max_size=3).map(",".join))


# Times around the clock change, so that most examples are affected.
TIMES = st.tuples(field(0, 59), field(0, 4), field(1, 31), field(1, 12), field(0, 6))


@given(fields=TIMES, change=st.sampled_from(CHANGES))
@settings(max_examples=40, deadline=None)
def test_any_crontab_runs_when_every_minute_says_that_it_should(
    fields: tuple[str, ...], change: tuple[str, datetime]
) -> None:
    form = " ".join(fields)
    try:
        crontab.from_string(form)
    except ValueError:
        # A day that exists in no month.
        return
    assert_runs_as_expected(form, change[0], *around(*change, HOUR, 8 * HOUR))


@pytest.mark.parametrize("form", ["30 2 * * sun", "45 1 */10 mar-nov *", "0 */6 29 2 *"])
@pytest.mark.parametrize("zone", ZONES)
def test_a_rare_crontab_runs_in_all_of_the_year(zone: str, form: str) -> None:
    # With a 29 February.
    assert_runs_as_expected(form, zone, datetime(2027, 9, 1, tzinfo=UTC), datetime(2028, 12, 1, tzinfo=UTC))


@pytest.mark.parametrize("seconds", [60, 300, 3600, 5400])
@pytest.mark.parametrize(("zone", "night"), CHANGES)
def test_an_interval_is_as_long_as_ever(zone: str, night: datetime, seconds: int) -> None:
    start, end = around(zone, night, 6 * HOUR, 12 * HOUR)
    beat = Beat(zone, start)

    times = list(beat.runs(beat.entry(float(seconds)), end))

    # Each run is a tick late.
    assert {round((after - before) / MINUTE) for before, after in pairwise(times)} <= {seconds // 60, seconds // 60 + 1}
    assert len(times) >= (end - start).total_seconds() // (seconds + 1) - 1


@pytest.mark.parametrize("hours", [2, 3, 4, 12, 36])
@pytest.mark.parametrize("form", ["30 2 * * *", "45 1 * * *", "0 9 * * *", "0,30 1-3 * * *", "*/15 * * * *"])
@pytest.mark.parametrize(("zone", "night"), CHANGES)
def test_what_a_beat_missed_that_was_down_over_the_change_is_sent_once(
    zone: str, night: datetime, form: str, hours: int
) -> None:
    start, end = around(zone, night, HOUR, 48 * HOUR)
    beat = Beat(zone, start)
    entry = beat.entry(crontab.from_string(form))
    up = start + hours * HOUR + 7 * MINUTE
    beat.now = up

    times = list(beat.runs(entry, end))

    late = [up] if expected(form, zone, start, up + MINUTE) else []
    assert times == late + expected(form, zone, up, end)


@pytest.mark.parametrize(("zone", "night"), CHANGES)
def test_an_entry_of_the_code_is_no_other(zone: str, night: datetime) -> None:
    form, name = "30 2 * * *", "report-free-space"
    code = beat_schedule(load({"BEAT_SCHEDULE": f"{name}={form}"}).beat.schedule)[name]
    assert_runs_as_expected(form, zone, *around(zone, night, 8 * HOUR, 30 * HOUR), name=name, **code)


def test_a_time_that_is_shown_twice_is_kept_as_the_one_that_it_is() -> None:
    beat = Beat("Europe/Berlin", datetime(2026, 10, 25, 1, 30, tzinfo=UTC))
    entry = beat.entry(300.0)

    assert entry.last_run_at.fold == 1
    read = entries.read(beat.app, entry.key, stored(entry))
    assert read.last_run_at.astimezone(UTC) == beat.now
    assert entry.due_at == beat.now + timedelta(seconds=300)
