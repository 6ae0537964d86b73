"""The periodic tasks that beat sends. BEAT_SCHEDULE changes an entry's period or switches it off."""

from collections.abc import Iterable
from typing import Any

from celery.schedules import ParseException, crontab

from config import ConfigError
from services.beat import summer_time

# Before the first crontab is made.
summer_time.install()

# Add an entry here; its `schedule` is a number of seconds or a crontab. services/beat/entries.py has those that are
# added at run time.
ENTRIES: dict[str, dict[str, Any]] = {
    "report-free-space": {
        "task": "services.tasks.disk.report_free_space",
        # Five minutes: a disk that fills at 100 MB/s gives a warning before 30 GB are gone.
        "schedule": 300.0,
        # A report that waited for longer than its period says nothing new.
        "options": {"expires": 300.0},
    },
}


def beat_schedule(changes: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Return ENTRIES with the changes of BEAT_SCHEDULE.

    Raises ConfigError for an entry that does not exist and for a crontab that cannot be read.
    """
    entries = {name: dict(entry) for name, entry in ENTRIES.items()}
    problems = []
    for name, period in changes:
        if name not in ENTRIES:
            problems.append(f"BEAT_SCHEDULE: found entry {name!r}; allowed: {', '.join(sorted(ENTRIES))}")
        elif period == "off":
            entries.pop(name, None)
        else:
            try:
                entries[name] = set_period(ENTRIES[name], period)
            except (ValueError, ParseException) as error:
                problems.append(f"BEAT_SCHEDULE: the crontab {period!r} of {name} cannot be read ({error})")
    if problems:
        raise ConfigError(problems)
    return entries


def set_period(entry: dict[str, Any], period: str) -> dict[str, Any]:
    """Return `entry` with another period: whole seconds or five crontab fields.

    Raises ValueError or ParseException for a crontab that cannot be read.
    """
    if not period.isdigit():
        return entry | {"schedule": crontab.from_string(period)}
    options = dict(entry.get("options", {}))
    if "expires" in options:
        options["expires"] = float(period)
    return entry | {"schedule": float(period), "options": options}
