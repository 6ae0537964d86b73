"""When a crontab is due where clocks are changed: as Debian's cron has it.

A crontab whose minute or hour begins with * is due whenever the clock shows one of its times: twice in the hour that
autumn repeats, never in the one that spring leaves out. Any other names fixed times, each of which comes once a day:
when the clock shows it first, or right after the gap that it was in. Celery takes the difference between two times of
a clock for the time between them (celery 5.7), and is wrong by as much as a clock is changed.

Not cronsim, which has the same rules: it ORs day of month and day of week where Celery ANDs them, reads other names
and ranges than Celery, and is as long as this ten times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.schedules import crontab, solar

from services.broker.client import LateConfigError

# No zone changes its clock by more for summer time: two hours in Antarctica, elsewhere one or half of it.
LONGEST_CHANGE = timedelta(hours=3)


def install() -> None:
    """Have every crontab of Celery's reckon so, whoever makes it: the schedule, RedBeat's decoder, a shell.

    A solar schedule cannot be made from then on: RedBeat could not keep it, with its package no more than without.
    """
    crontab.remaining_estimate = _remaining_estimate
    solar.__init__ = _refuse_solar


def _refuse_solar(_: Any, *place: Any, **named: Any) -> None:
    written = ", ".join([*map(repr, place), *(f"{name}={value!r}" for name, value in named.items())])
    raise LateConfigError(
        f"solar({written}): beat keeps its schedule in Redis, where RedBeat has no form for a solar one, with the "
        "package ephem no more than without: write a crontab in its place"
    )


def _remaining_estimate(self: Any, last_run_at: datetime, ffwd: Any = None) -> timedelta:
    now: datetime = self.maybe_make_aware(self.now())
    return following(self, self.maybe_make_aware(last_run_at)) - now.astimezone(UTC)


def following(schedule: Any, moment: datetime) -> datetime:
    """When a crontab is due next after this moment, in UTC.

    Raises ValueError for one that never is: Celery takes an empty field.
    """
    if not (schedule.minute and schedule.hour and schedule.day_of_week):
        raise ValueError(f"the crontab {schedule!r} has an empty field: name a minute, an hour and a day of the week")
    moment = moment.astimezone(UTC)
    # What the clock will show a second time may be past.
    start = min(_shown(schedule, moment), _shown(schedule, moment + LONGEST_CHANGE) - LONGEST_CHANGE)
    # Moments of each kind come in their order: the first time that the clock shows something, and the second.
    kinds = (0, 1) if _is_wildcard(schedule) else (0,)
    return min(next(due for due in _moments(schedule, start, kind) if due > moment) for kind in kinds)


def _is_wildcard(schedule: Any) -> bool:
    return any(str(field).startswith("*") for field in (schedule._orig_minute, schedule._orig_hour))


def _moments(schedule: Any, start: datetime, fold: int) -> Iterator[datetime]:
    """When the clock shows the times of a crontab, from `start` on, for the first or the second time."""
    for time in _times(schedule, start):
        moment = _moment(schedule, time, fold)
        if _shown(schedule, moment) == time:
            yield moment
        elif not _is_wildcard(schedule):
            yield _after_gap(schedule, time)


def _times(schedule: Any, start: datetime) -> Iterator[datetime]:
    """The times of a crontab, as a clock shows them that nobody changes. As in Celery, all three day fields hold."""
    hours, minutes = sorted(schedule.hour), sorted(schedule.minute)
    start = start.replace(second=0, microsecond=0)
    day = start.replace(hour=0, minute=0)
    while True:
        if (
            day.month in schedule.month_of_year
            and day.day in schedule.day_of_month
            and day.isoweekday() % 7 in schedule.day_of_week
        ):
            left = (hour for hour in hours if day.replace(hour=hour, minute=59) >= start)
            times = (day.replace(hour=hour, minute=minute) for hour in left for minute in minutes)
            yield from (time for time in times if time >= start)
        day += timedelta(days=1)


def _moment(schedule: Any, time: datetime, fold: int = 0) -> datetime:
    return time.replace(tzinfo=schedule.tz, fold=fold).astimezone(UTC)


def _shown(schedule: Any, moment: datetime) -> datetime:
    """What the clock shows."""
    return moment.astimezone(schedule.tz).replace(tzinfo=None, fold=0)


def _after_gap(schedule: Any, time: datetime) -> datetime:
    while _shown(schedule, _moment(schedule, time)) != time:
        time += timedelta(minutes=1)
    return _moment(schedule, time)
