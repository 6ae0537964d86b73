"""When a crontab is due where clocks are changed: as Debian's cron has it.

A crontab whose minute or hour begins with * is due whenever the clock shows one of its times: twice in the hour that
autumn repeats, never in the one that spring leaves out. Any other has fixed times, each of which comes once a day:
when the clock shows it first, or right after the gap that it was in. Celery subtracts local times (celery 5.7), and
is wrong by as much as a clock is changed.

cronsim has the same rules, but ORs day of month and day of week where Celery ANDs them, and reads other names and
ranges than Celery.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.schedules import crontab, solar

from services.broker.client import LateConfigError

# No zone changes its clock by more for summer time: two hours in Antarctica, elsewhere one or half of it.
LONGEST_CHANGE = timedelta(hours=3)


def install() -> None:
    """Patch Celery's crontab, which is made in the schedule, by RedBeat's decoder and in shells.

    Solar schedules are refused: RedBeat cannot store them, with or without the package ephem.
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
    return get_next_due(self, self.maybe_make_aware(last_run_at)) - now.astimezone(UTC)


def get_next_due(schedule: Any, moment: datetime) -> datetime:
    """When a crontab is due next after `moment`, in UTC.

    Raises ValueError for a crontab with an empty field, which Celery accepts and which is never due.
    """
    if not (schedule.minute and schedule.hour and schedule.day_of_week):
        raise ValueError(f"the crontab {schedule!r} has an empty field: name a minute, an hour and a day of the week")
    moment = moment.astimezone(UTC)
    # A time that the clock will show again may lie before what it shows now.
    start = min(_to_local(schedule, moment), _to_local(schedule, moment + LONGEST_CHANGE) - LONGEST_CHANGE)
    # Fold 0 is the first time that the clock shows something, fold 1 the second; each alone is in order.
    folds = (0, 1) if _is_wildcard(schedule) else (0,)
    return min(next(due for due in _moments(schedule, start, fold) if due > moment) for fold in folds)


def _is_wildcard(schedule: Any) -> bool:
    return any(str(field).startswith("*") for field in (schedule._orig_minute, schedule._orig_hour))


def _moments(schedule: Any, start: datetime, fold: int) -> Iterator[datetime]:
    """Moments at which the clock shows the times of a crontab, from `start` on, with this fold."""
    for time in _times(schedule, start):
        moment = _to_utc(schedule, time, fold)
        if _to_local(schedule, moment) == time:
            yield moment
        elif not _is_wildcard(schedule):
            yield _find_end_of_gap(schedule, time)


def _times(schedule: Any, start: datetime) -> Iterator[datetime]:
    """Local times of a crontab, without regard to clock changes. As in Celery, all three day fields must match."""
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


def _to_utc(schedule: Any, time: datetime, fold: int = 0) -> datetime:
    return time.replace(tzinfo=schedule.tz, fold=fold).astimezone(UTC)


def _to_local(schedule: Any, moment: datetime) -> datetime:
    """The local time at `moment`."""
    return moment.astimezone(schedule.tz).replace(tzinfo=None, fold=0)


def _find_end_of_gap(schedule: Any, time: datetime) -> datetime:
    while _to_local(schedule, _to_utc(schedule, time)) != time:
        time += timedelta(minutes=1)
    return _to_utc(schedule, time)
