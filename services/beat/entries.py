"""Entries of the schedule in Redis: those of the code, and those that are saved at run time with RedBeat's own class.

`configure` corrects what celery-redbeat 2.4.2 gets wrong, in beat and in every process that saves an entry:

- An entry that is saved again keeps its last run, but RedBeat computes when it is due from another one: an entry that
  is saved often never runs, and one that is switched on again runs at once, for the runs that it missed.
- A time does not say which of autumn's two equal hours it is in, and the next run is computed in local time.
- An entry of the code can be replaced until beat's next start, and one named `lock` takes the key of beat's lock.
"""

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
# The fields of an entry's hash; RedBeat keeps its last run in "meta".
STORED = ("definition", "meta")

# RedBeat's own, which removes entries of the code as well.
remove = RedBeatSchedulerEntry.delete


def configure(app: Celery) -> Any:
    """Replace the parts of RedBeat that this module corrects, and return its settings for `app`."""
    schedulers.RedBeatJSONEncoder = Encoder
    RedBeatSchedulerEntry.due_at = property(due_at)
    RedBeatSchedulerEntry.save = save
    RedBeatSchedulerEntry.delete = delete
    return RedBeatConfig(app)


class Encoder(RedBeatJSONEncoder):  # type: ignore[misc]
    """RedBeat's JSON encoder, which also writes `fold` of a time, and the sets and ranges of a crontab.

    Any RedBeat can read that.
    """

    def default(self, o: Any) -> Any:
        encoded = super().default(o)
        if isinstance(o, crontab):
            return {key: sorted(v) if isinstance(v, set | frozenset | range) else v for key, v in encoded.items()}
        return encoded | {"fold": o.fold} if isinstance(o, datetime) and o.fold else encoded


class InvalidEntry(Exception):
    """What is stored under an entry's key is not an entry; the message says why."""


class EntryRemoved(InvalidEntry):
    """The entry has been removed."""


def due_at(self: Any) -> datetime | None:
    """When an entry is due next, in UTC: now at the earliest. None when its schedule has ended."""
    now: datetime = self.default_now().astimezone(UTC)
    left = self.schedule.remaining_estimate(self.last_run_at) if self.last_run_at else timedelta()
    return None if left is None else now + max(left, timedelta())


def save(self: Any) -> Any:
    """Write an entry into Redis; it replaces an entry of the same name.

    Raises ValueError, and writes nothing, for a name that is reserved or one of the code's.
    """
    _check_name(self)
    write(self)
    return self


def delete(self: Any) -> None:
    """Remove an entry from Redis. Raises ValueError for one of the code."""
    _check_name(self)
    remove(self)


def _check_name(entry: Any) -> None:
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
    """Import all tasks, as beat does when it starts: their modules may call `add_periodic_task`."""
    app.loader.import_default_modules()
    app.finalize()


def is_of_code(app: Celery, name: str) -> bool:
    """Whether the code has an entry of this name, even one that BEAT_SCHEDULE has switched off."""
    return name in ENTRIES or name in app.conf.beat_schedule


def is_reserved(entry: Any) -> bool:
    """Whether an entry's key is one that beat uses for something else."""
    conf = entry.app.redbeat_conf
    return entry.key in (BEAT_LOCK, conf.schedule_key, conf.statics_key)


def write(entry: Any) -> None:
    """Write an entry into Redis, of the code or not, for beat to read at its next tick.

    Beat computes when it is due, from the last run in Redis: this process may be in another time zone.
    """
    conf = entry.app.redbeat_conf

    def put(pipe: Any) -> None:
        keeps = _keeps_last_run(entry, pipe.hmget(entry.key, *STORED))
        definition = encode({name: getattr(entry, name) for name in DEFINITION})
        # -1 for an entry whose schedule has ended, otherwise 0: beat looks at it at once.
        score = min(entry.score, 0)
        # Beat removes the entries in this set that the code no longer has: not one that is saved at run time.
        update_statics = pipe.sadd if is_of_code(entry.app, entry.name) else pipe.srem
        pipe.multi()
        pipe.hset(entry.key, mapping={"definition": definition} | ({} if keeps else {"meta": encode_meta(entry)}))
        pipe.zadd(conf.schedule_key, {entry.key: score})
        update_statics(conf.statics_key, entry.name)

    get_redis(entry.app).transaction(put, entry.key)


def _keeps_last_run(entry: Any, stored: Any) -> bool:
    """Give an entry the last run that is stored; whether the stored one stays valid."""
    try:
        old = read(entry.app, entry.key, stored)
    except InvalidEntry:
        return False
    # The runs that it missed while it was off are not made up for.
    switched_on = entry.enabled and not old.enabled
    entry.last_run_at = entry.default_now() if switched_on else old.last_run_at
    entry.total_run_count = old.total_run_count
    return not switched_on


def encode(value: Any) -> str:
    """Encode as JSON that RedBeat reads."""
    return json.dumps(value, cls=Encoder)


def encode_meta(entry: Any) -> str:
    """Encode an entry's last run and its number of runs, for the field "meta"."""
    return encode({"last_run_at": entry.last_run_at, "total_run_count": entry.total_run_count})


def fetch(client: Redis, keys: Iterable[str]) -> list[Any]:
    """Fetch definition and meta of each key for `read`, or the error that Redis answered for it."""
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.hmget(key, *STORED)
        return pipe.execute(raise_on_error=False)


def read(app: Celery, key: str, stored: Any) -> Any:
    """Decode the entry that `fetch` found under a key. Raises InvalidEntry, EntryRemoved, or the error of Redis."""
    if isinstance(stored, Exception):
        raise InvalidEntry(str(stored)) if str(stored).startswith("WRONGTYPE") else stored
    definition, known = stored
    if not definition:
        raise EntryRemoved("it has been removed")
    try:
        known = RedBeatSchedulerEntry.decode_meta(known)
        entry = RedBeatSchedulerEntry(app=app, **RedBeatSchedulerEntry.decode_definition(definition) | known)
        # Celery's constructor replaces None by the current time.
        entry.last_run_at = known["last_run_at"]
    except Exception as error:  # whatever somebody has written there
        raise InvalidEntry(_format_error(error)) from None
    if entry.key != key:
        raise InvalidEntry(f"its name in there is {entry.name!r}")
    if not isinstance(entry.task, str):
        raise InvalidEntry(f"its task is {entry.task!r}")
    return entry


def _format_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def list_entries(app: Celery) -> dict[str, Any]:
    """List all entries, those of the code first, or an "error" of the code.

    Raises RedisError or OSError when Redis does not answer.
    """
    conf = app.redbeat_conf
    try:
        _import_code(app)
    except Exception as error:  # a module may raise whatever its author let it
        return {"error": f"the tasks cannot be imported: {_format_error(error)}"}
    client = get_redis(app)
    there = [key.removeprefix(conf.key_prefix) for key in client.zrange(conf.schedule_key, 0, -1)]
    names = sorted({*there, *ENTRIES, *conf.schedule}, key=lambda name: (not is_of_code(app, name), name))
    found = fetch(client, [conf.key_prefix + name for name in names])
    return {"schedule": [_row(app, name, stored) for name, stored in zip(names, found, strict=True)]}


def _row(app: Celery, name: str, stored: Any) -> dict[str, Any]:
    row = dict.fromkeys(("name", "source", "task", "schedule", "enabled", "last_run", "next_due", "problem"))
    row |= {"name": name, "source": "code" if is_of_code(app, name) else "run time"}
    try:
        entry = read(app, app.redbeat_conf.key_prefix + name, stored)
        last = entry.last_run_at if entry.total_run_count else None
        due = entry.due_at if entry.enabled else None
        return row | _describe(entry) | {"last_run": _format_time(app, last), "next_due": _format_time(app, due)}
    except EntryRemoved as gone:
        if not is_of_code(app, name):
            return row | {"problem": str(gone)}
        # It is switched off, or beat has not written it yet.
        code = app.conf.beat_schedule.get(name) or ENTRIES[name]
        entry = RedBeatSchedulerEntry(**dict(code, name=name, app=app))
        return row | _describe(entry) | {"enabled": name in app.conf.beat_schedule}
    except InvalidEntry as broken:
        return row | {"problem": str(broken)}
    except RedisError:
        raise
    except Exception as error:  # a schedule may raise anything when it is asked when it is due
        return row | {"problem": _format_error(error)}


def _describe(entry: Any) -> dict[str, Any]:
    return {"task": entry.task, "schedule": format_schedule(entry.schedule), "enabled": entry.enabled}


def format_schedule(found: Any) -> str:
    """Format a schedule as in BEAT_SCHEDULE, or as its repr where that has no form for it."""
    if isinstance(found, crontab):
        day, month, weekday = found._orig_day_of_month, found._orig_month_of_year, found._orig_day_of_week
        fields = (found._orig_minute, found._orig_hour, day, month, weekday)
        return " ".join(str(one) if isinstance(one, str | int) else ",".join(map(str, sorted(one))) for one in fields)
    return f"{found.run_every.total_seconds():g}" if isinstance(found, schedule) else repr(found)


def _format_time(app: Celery, moment: datetime | None) -> str | None:
    """Format as ISO 8601, to the nearest second, in the application's time zone."""
    nearest = moment and moment.astimezone(UTC) + timedelta(seconds=0.5)
    return nearest.astimezone(app.timezone).isoformat(timespec="seconds") if nearest else None
