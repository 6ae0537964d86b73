"""Entries of the schedule as RedBeat keeps them in Redis: those of the code, and those that are saved at run time.

Any process that has the application adds, changes, switches off and removes entries with RedBeat's own class. Where
celery-redbeat 2.4.2 is wrong about them, `configure` puts it right, in a process that saves as well as in beat:

- An entry that is saved again keeps its last run, and was due by another: one that is saved often never ran. One that
  was switched off and is on again was due at once, for what it had missed.
- A time did not say which of autumn's two equal hours it is in, and the next one was reckoned by the clock on the wall.
- An entry of the code could be replaced until beat's next start, and one named `lock` keeps every beat from its lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery
from celery.schedules import crontab, schedule
from redbeat import schedulers
from redbeat.decoder import RedBeatJSONEncoder
from redbeat.schedulers import RedBeatConfig, RedBeatSchedulerEntry, get_redis
from redis import Redis
from redis.exceptions import RedisError

from services.broker.keys import BEAT_LOCK
from services.schedule import ENTRIES

DEFINITION = ("name", "task", "args", "kwargs", "options", "schedule", "enabled")
# The fields of its hash: what it is, and what RedBeat keeps of its runs.
STORED = ("definition", "meta")
GOOD, BAD = 0, 1

# Of any entry, as RedBeat has it.
remove = RedBeatSchedulerEntry.delete


def configure(app: Celery) -> Any:
    """RedBeat's settings for this application; RedBeat itself is as this module says from then on."""
    schedulers.RedBeatJSONEncoder = Encoder
    RedBeatSchedulerEntry.due_at = property(due_at)
    RedBeatSchedulerEntry.save = save
    RedBeatSchedulerEntry.delete = delete
    return RedBeatConfig(app)


class Encoder(RedBeatJSONEncoder):  # type: ignore[misc]
    """RedBeat's, which says of a time that a clock shows twice which one it is; every RedBeat can read that.

    It also writes the fields of a crontab that JSON cannot: sets and ranges, two forms of Celery's.
    """

    def default(self, o: Any) -> Any:
        encoded = super().default(o)
        if isinstance(o, crontab):
            return {key: sorted(v) if isinstance(v, set | frozenset | range) else v for key, v in encoded.items()}
        return encoded | {"fold": o.fold} if isinstance(o, datetime) and o.fold else encoded


class Broken(Exception):
    """What Redis has under an entry's key is no entry; the sentence says why."""


class Gone(Broken):
    """There is none any more."""


def due_at(self: Any) -> datetime | None:
    """When an entry is due next, in UTC, and never in the past; None when it never is again."""
    now: datetime = self.default_now().astimezone(UTC)
    left = self.schedule.remaining_estimate(self.last_run_at) if self.last_run_at else timedelta()
    return None if left is None else now + max(left, timedelta())


def save(self: Any) -> Any:
    """Write an entry into Redis, over the one of its name that may be there.

    Raises ValueError, and writes nothing, for a name that it cannot have.
    """
    _refuse(self)
    write(self)
    return self


def delete(self: Any) -> None:
    """Remove an entry from Redis.

    Raises ValueError for one of the code.
    """
    _refuse(self)
    remove(self)


def _refuse(entry: Any) -> None:
    _import_code(entry.app)
    if is_of_code(entry.app, entry.name):
        own = entry.name in ENTRIES
        place = "in services/schedule.py or with BEAT_SCHEDULE" if own else "where add_periodic_task is called"
        raise ValueError(
            f"the entry {entry.name!r} is one of the code: give yours another name, or change that one {place}"
        )
    if is_reserved(entry):
        raise ValueError(f"beat needs the key of an entry that is named {entry.name!r}: give it another name")


def _import_code(app: Celery) -> None:
    """Import tasks as beat does before it starts: their modules may add entries (`add_periodic_task`)."""
    app.loader.import_default_modules()
    app.finalize()


def is_of_code(app: Celery, name: str) -> bool:
    """Whether the code has an entry of this name, even one that BEAT_SCHEDULE has switched off."""
    return name in ENTRIES or name in app.conf.beat_schedule


def is_reserved(entry: Any) -> bool:
    """Whether an entry's key would be one that beat needs for something else."""
    conf = entry.app.redbeat_conf
    return entry.key in (BEAT_LOCK, conf.schedule_key, conf.statics_key)


def write(entry: Any) -> None:
    """Write any entry into Redis, for beat to look at with its next tick.

    Beat reckons when it is due, from the last run that is known there: this process may be in another time zone.
    """
    conf = entry.app.redbeat_conf

    def put(pipe: Any) -> None:
        keeps = _keeps_last_run(entry, pipe.hmget(entry.key, *STORED))
        definition = encoded({name: getattr(entry, name) for name in DEFINITION})
        # -1 is one that has come to its end.
        score = min(entry.score, 0)
        # What the code once had is not beat's to remove when somebody else saves it now.
        mark = pipe.sadd if is_of_code(entry.app, entry.name) else pipe.srem
        pipe.multi()
        pipe.hset(entry.key, mapping={"definition": definition} | ({} if keeps else {"meta": runs(entry)}))
        pipe.zadd(conf.schedule_key, {entry.key: score})
        mark(conf.statics_key, entry.name)

    get_redis(entry.app).transaction(put, entry.key)


def _keeps_last_run(entry: Any, stored: Any) -> bool:
    """Give an entry the last run that is stored, and say whether that stays as it is."""
    try:
        old = read(entry.app, entry.key, stored)
    except Broken:
        return False
    # What it has missed while it was off is not wanted any more.
    switched_on = entry.enabled and not old.enabled
    entry.last_run_at = entry.default_now() if switched_on else old.last_run_at
    entry.total_run_count = old.total_run_count
    return not switched_on


def encoded(value: Any) -> str:
    """JSON as RedBeat reads it."""
    return json.dumps(value, cls=Encoder)


def runs(entry: Any) -> str:
    """What RedBeat keeps of an entry's runs."""
    return encoded({"last_run_at": entry.last_run_at, "total_run_count": entry.total_run_count})


def fetch(client: Redis, keys: Iterable[str]) -> list[Any]:
    """What is stored under each key, for `read`: definition and meta, or the error that Redis has answered."""
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.hmget(key, *STORED)
        return pipe.execute(raise_on_error=False)


def read(app: Celery, key: str, stored: Any) -> Any:
    """The entry that is stored under a key.

    Raises Broken or Gone, and the error in place of what is stored.
    """
    if isinstance(stored, Exception):
        raise Broken(str(stored)) if str(stored).startswith("WRONGTYPE") else stored
    definition, known = stored
    if not definition:
        raise Gone("it has been removed")
    try:
        known = RedBeatSchedulerEntry.decode_meta(known)
        entry = RedBeatSchedulerEntry(app=app, **RedBeatSchedulerEntry.decode_definition(definition) | known)
        # Celery takes none for now.
        entry.last_run_at = known["last_run_at"]
    except Exception as error:  # whatever somebody has written there
        raise Broken(said(error)) from None
    if entry.key != key:
        raise Broken(f"its name in there is {entry.name!r}")
    if not isinstance(entry.task, str):
        raise Broken(f"its task is {entry.task!r}")
    return entry


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# Listing.


def listed(app: Celery) -> tuple[dict[str, Any], int]:
    """Every entry, those of the code first: the object to print and the exit code."""
    conf = app.redbeat_conf
    try:
        _import_code(app)
    except Exception as error:  # a module may raise whatever its author let it
        return {"error": f"the tasks cannot be imported: {said(error)}"}, BAD
    try:
        client = get_redis(app)
        there = [key.removeprefix(conf.key_prefix) for key in client.zrange(conf.schedule_key, 0, -1)]
        names = sorted({*there, *ENTRIES, *conf.schedule}, key=lambda name: (not is_of_code(app, name), name))
        found = fetch(client, [conf.key_prefix + name for name in names])
        rows = [_row(app, name, stored) for name, stored in zip(names, found, strict=True)]
    except (RedisError, OSError) as error:
        return {"error": f"Redis does not answer: {error}"}, BAD
    return {"schedule": rows}, GOOD


def _row(app: Celery, name: str, stored: Any) -> dict[str, Any]:
    row = dict.fromkeys(("name", "source", "task", "schedule", "enabled", "last_run", "next_due", "problem"))
    row |= {"name": name, "source": "code" if is_of_code(app, name) else "run time"}
    try:
        entry = read(app, app.redbeat_conf.key_prefix + name, stored)
        last = entry.last_run_at if entry.total_run_count else None
        due = entry.due_at if entry.enabled else None
        return row | _shown(entry) | {"last_run": _when(app, last), "next_due": _when(app, due)}
    except Gone as gone:
        if not is_of_code(app, name):
            return row | {"problem": str(gone)}
        # It is off, or beat has not written it yet.
        code = app.conf.beat_schedule.get(name) or ENTRIES[name]
        entry = RedBeatSchedulerEntry(**dict(code, name=name, app=app))
        return row | _shown(entry) | {"enabled": name in app.conf.beat_schedule}
    except Broken as broken:
        return row | {"problem": str(broken)}
    except RedisError:
        raise
    except Exception as error:  # whatever a schedule that somebody has written there says when it is asked
        return row | {"problem": said(error)}


def _shown(entry: Any) -> dict[str, Any]:
    return {"task": entry.task, "schedule": period(entry.schedule), "enabled": entry.enabled}


def period(found: Any) -> str:
    """A schedule as BEAT_SCHEDULE has it, where it can."""
    if isinstance(found, crontab):
        day, month, weekday = found._orig_day_of_month, found._orig_month_of_year, found._orig_day_of_week
        fields = (found._orig_minute, found._orig_hour, day, month, weekday)
        return " ".join(str(one) if isinstance(one, str | int) else ",".join(map(str, sorted(one))) for one in fields)
    return f"{found.run_every.total_seconds():g}" if isinstance(found, schedule) else repr(found)


def _when(app: Celery, moment: datetime | None) -> str | None:
    """ISO 8601, to the nearest second, in the time zone in which crontabs are read."""
    nearest = moment and moment.astimezone(UTC) + timedelta(seconds=0.5)
    return nearest.astimezone(app.timezone).isoformat(timespec="seconds") if nearest else None
