"""Entries of the schedule that are added, changed, switched off and removed while beat runs."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab
from redbeat import RedBeatSchedulerEntry
from redbeat.schedules import rrule

from config import load
from services.beat.scheduler import LockedScheduler
from tests.integration.beat.test_beat import FREEZING, SCHEDULE, state, ticks
from tests.integration.commands.test_call import services
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.support.documents import block
from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import stop
from tests.unit.services.test_summer_time import expected

OFF = "report-free-space=off"
IMPORTS = """
from datetime import timedelta
from celery.schedules import crontab
from redbeat import RedBeatSchedulerEntry
from services.app import app
Entry = RedBeatSchedulerEntry
"""
# Of a release: where code stands, what it was and what it becomes.
OTHER_ENTRY = ("services/schedule.py", '"report-free-space": {', '"another": {')
# Each second, with arguments that tell one definition from another.
EACH_SECOND = "Entry('one', 'no.such.task', 1, args=[{word!r}], enabled={enabled}, app=app).save()"

INTERVAL = {"__type__": "interval", "every": 1.0, "relative": False}
FIELDS = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
EACH_MINUTE = {"__type__": "crontab"} | dict.fromkeys(FIELDS, "*")
NEVER_RUN = '{"last_run_at": null}'
LONG_AGO = {"__type__": "datetime", "year": 2026, "month": 1, "day": 1, "hour": 0, "minute": 0, "timezone": "UTC"}
NO_ZONE = '{"last_run_at": {"__type__": "datetime", "year": 2026, "month": 1, "day": 1, "timezone": "Mars"}}'


def definition(name: str, **fields: Any) -> bytes:
    given = {"name": name, "task": "t", "args": [], "kwargs": {}, "options": {}, "schedule": INTERVAL, "enabled": True}
    return json.dumps(given | fields).encode()


def run(stack: Stack, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that has the application, as in `make shell`."""
    return stack.harness.answer(["-c", IMPORTS + code], stack.environment(), TIMEOUT_SECONDS)


def do(stack: Stack, code: str) -> None:
    done = run(stack, code)
    assert done.returncode == 0, done.stderr


def assert_refused(stack: Stack, code: str, reason: str) -> None:
    assert run(stack, code).stderr.splitlines()[-1] == f"ValueError: {reason}"


def sent(stack: Stack, task: str = "no.such.task") -> list[Any]:
    """The first argument of each message of a task, oldest first."""
    messages = [json.loads(text) for text in stack.redis.client().lrange("celery", 0, -1)]
    found = [message["headers"]["argsrepr"] for message in messages if message["headers"]["task"] == task]
    return [text.strip("()[],'") for text in reversed(found)]


def wait_sent(stack: Stack, word: str = "", times: int = 1, task: str = "no.such.task") -> None:
    """Wait until so many of these have been sent."""
    what = f"beat sends {word} {times} times"
    stack.harness.wait_until(lambda: sent(stack, task).count(word) >= times, TIMEOUT_SECONDS, what)


def dump(stack: Stack) -> dict[str, Any]:
    """All that beat has in Redis."""
    client = stack.redis.client()
    return {str(key): client.dump(key) for key in client.keys("redbeat:*")}


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A beat without entries of the code, which looks at its schedule each second."""
    stack = shared_harness.stack(BEAT_SCHEDULE=OFF)
    do(stack, "Entry('metronome', 'metronome', 1, app=app).save()")
    stack.beat().says("beat: ticking")
    return stack


def test_an_entry_is_added_changed_switched_off_and_on_and_removed_while_beat_runs(stack: Stack) -> None:
    beat = stack.nodes[0]
    do(stack, EACH_SECOND.format(word="added", enabled=True))
    wait_sent(stack, "added", 2)

    do(stack, EACH_SECOND.format(word="changed", enabled=True))
    # No run of the old definition is sent after the change.
    added = sent(stack).count("added")
    wait_sent(stack, "changed", 2)

    do(stack, EACH_SECOND.format(word="off", enabled=False))
    before = sent(stack)
    ticks(beat, 2)
    assert sent(stack) == before

    do(stack, EACH_SECOND.format(word="on", enabled=True))
    wait_sent(stack, "on", 2)

    do(stack, "Entry.from_key('redbeat:one', app=app).delete()")
    before = sent(stack)
    ticks(beat, 2)
    assert sent(stack) == before
    assert before.count("added") == added
    assert not stack.redis.client().exists("redbeat:one")
    assert beat.process.count("Traceback") == 0


def test_an_entry_survives_a_restart_and_a_deploy(harness: Harness, own_checkout: Checkout) -> None:
    stack = harness.stack(BEAT_SCHEDULE=SCHEDULE)
    beat = stack.beat()
    do(stack, EACH_SECOND.format(word="kept", enabled=True))
    wait_sent(stack, "kept")
    assert stop(beat) == 0
    before = sent(stack).count("kept")
    # A release whose code has another entry, and lacks the one it had.
    own_checkout.replace(*OTHER_ENTRY)
    harness.checkout = own_checkout

    stack.beat(BEAT_SCHEDULE="another=1")

    wait_sent(stack, "kept", before + 2)
    wait_sent(stack, "", 2, "services.tasks.disk.report_free_space")
    client = stack.redis.client()
    assert client.smembers("redbeat::statics") == {"another"}
    assert set(client.zrange("redbeat::schedule", 0, -1)) == {"redbeat:another", "redbeat:one"}


def test_what_the_code_had_and_somebody_saves_now_stays(harness: Harness, own_checkout: Checkout) -> None:
    stack = harness.stack()
    stack.beat().says("beat: ticking")
    own_checkout.replace(*OTHER_ENTRY)
    harness.checkout = own_checkout
    do(stack, "Entry('report-free-space', 'no.such.task', 1, args=['mine'], app=app).save()")
    stop(stack.nodes[0])

    stack.beat()

    wait_sent(stack, "mine", 2)


PERIODIC = """
from celery import shared_task
from services.app import app

@shared_task
def say(): pass

@app.on_after_finalize.connect
def add(sender, **_):
    sender.add_periodic_task(60, say.s(), name="say-hello")
"""


@pytest.mark.parametrize("schedule", ["report-free-space=60", OFF])
def test_the_name_of_an_entry_of_the_code_is_refused_and_nothing_is_written(
    harness: Harness, own_checkout: Checkout, schedule: str
) -> None:
    own_checkout.write("periodic.py", PERIODIC)
    harness.checkout = own_checkout
    stack = harness.stack(BEAT_SCHEDULE=schedule, CELERY_IMPORTS="periodic")
    stop(stack.beat().says("beat: ticking"))
    before = dump(stack)

    for name, place in {
        "report-free-space": "in services/schedule.py or with BEAT_SCHEDULE",
        "say-hello": "where add_periodic_task is called",
    }.items():
        reason = f"the entry {name!r} is one of the code: give yours another name, or change that one {place}"
        for method in ("save", "delete"):
            assert_refused(stack, f"Entry({name!r}, 'no.such.task', 1, app=app).{method}()", reason)

    assert dump(stack) == before
    (row,) = (row for row in services(stack, "schedule").data["schedule"] if row["name"] == "say-hello")
    assert (row["source"], row["task"]) == ("code", "periodic.say")
    off = {"report-free-space"} if schedule == OFF else set()
    assert stack.redis.client().smembers("redbeat::statics") == {"report-free-space", "say-hello"} - off


EMPTY_FIELD = (
    "the crontab <crontab: * [] * * * (m/h/dM/MY/d)> has an empty field: name a minute, an hour and a day of the week"
)


@pytest.mark.parametrize(
    ("name", "schedule", "reason"),
    [
        *(
            (name, "1", f"beat needs the key of an entry that is named {name!r}: give it another name")
            for name in ("lock", ":schedule", ":statics")
        ),
        ("empty", "crontab(hour=[])", EMPTY_FIELD),
    ],
)
def test_an_entry_that_beat_could_not_read_is_refused(stack: Stack, name: str, schedule: str, reason: str) -> None:
    assert_refused(stack, f"Entry({name!r}, 'no.such.task', {schedule}, app=app).save()", reason)

    assert not stack.redis.client().exists("redbeat:empty")
    assert state(stack.nodes[0]) == "ticking"


def test_entries_are_due_by_their_last_run_until_their_schedule_ends_and_not_for_what_they_missed(
    stack: Stack,
) -> None:
    # An application may save it at each start; with RedBeat it would never run if that came more often than an hour.
    code = (
        "Entry('hourly', 'no.such.task', 3600, args=['hourly'], app=app).save()\n"
        "Entry('weekly', 'no.such.task', 604800, args=['weekly'], enabled={}, app=app).save()\n"
    )
    once = (
        "from redbeat.schedules import rrule\n"
        "soon = rrule('SECONDLY', dtstart=app.now() + timedelta(seconds=2), count=1)\n"
        "Entry('once', 'no.such.task', soon, args=['once'], app=app).save()\n"
    )
    client = stack.redis.client()
    do(stack, code.format(False))
    for name in ("hourly", "weekly"):
        client.hset(f"redbeat:{name}", "meta", json.dumps({"last_run_at": LONG_AGO, "total_run_count": 7}))

    do(stack, code.format(True) + once)

    wait_sent(stack, "hourly")
    wait_sent(stack, "once")
    assert json.loads(str(client.hget("redbeat:hourly", "meta")))["total_run_count"] == 8
    ticks(stack.nodes[0], 2)
    assert [sent(stack).count(name) for name in ("hourly", "weekly", "once")] == [1, 0, 1]
    assert client.zscore("redbeat::schedule", "redbeat:once") == -1


# Definitions that cannot be decoded, or sent.
BROKEN: dict[str, tuple[bytes, str]] = {
    "not-json": (b"{", NEVER_RUN),
    "not-utf-8": (b'{"name": "not-utf-8", "task": "\xff\xfe', NEVER_RUN),
    "no-object": (b"[1]", NEVER_RUN),
    "other-name": (definition("another"), NEVER_RUN),
    "no-schedule": (definition("no-schedule", schedule=None), NEVER_RUN),
    "no-such-type": (definition("no-such-type", schedule={"__type__": "moon"}), NEVER_RUN),
    "more": (definition("more", colour="red"), NEVER_RUN),
    "no-such-zone": (definition("no-such-zone"), NO_ZONE),
    "bad-meta": (definition("bad-meta"), '{"last_run_at": 7}'),
    "bad-options": (definition("bad-options", options=7), NEVER_RUN),
    "no-minute": (definition("no-minute", schedule=EACH_MINUTE | {"minute": []}), NEVER_RUN),
    "no-task": (definition("no-task", task=7), NEVER_RUN),
}


def test_a_broken_entry_is_reported_and_keeps_no_other(harness: Harness) -> None:
    stack = harness.stack(BEAT_SCHEDULE=OFF)
    beat = stack.beat().says("beat: ticking")
    client = stack.redis.client()
    for name, (broken, meta) in BROKEN.items():
        client.hset(f"redbeat:{name}", mapping={"definition": broken, "meta": meta})
    client.set("redbeat:no-hash", "?")
    keys = [f"redbeat:{name}" for name in (*BROKEN, "no-hash")]
    client.zadd("redbeat::schedule", dict.fromkeys([*keys, "redbeat:gone"], 0))

    do(stack, EACH_SECOND.format(word="good", enabled=True))

    wait_sent(stack, "good", 3)
    assert beat.process.alive
    assert state(beat) == "ticking"
    assert beat.process.count("Traceback") == 0
    reported = beat.process.matches(r"beat: (\S+) (?:cannot be read|could not be sent)")
    assert Counter(name.removeprefix("redbeat:") for name in reported) == Counter([*BROKEN, "no-hash"])
    assert set(client.zrange("redbeat::schedule", 0, -1)) == {*keys, "redbeat:one"}

    # A beat that starts with them reads all entries.
    stop(beat)
    before = sent(stack).count("good")
    other = stack.beat()
    wait_sent(stack, "good", before + 2)
    assert state(other) == "ticking"

    # Saving it again repairs it.
    do(stack, "Entry('not-json', 'no.such.task', 1, args=['mended'], app=app).save()")
    wait_sent(stack, "mended")


# Changes that are made while beat has read an entry and is suspended in the middle of sending it.
CHANGES = {
    "changed": "Entry('one', 'no.such.task', crontab(), args=['new'], app=app).save()",
    "off": EACH_SECOND.format(word="old", enabled=False),
    "removed": "Entry('one', app=app).delete()",
}


def test_what_is_changed_between_a_look_and_a_send_is_not_sent_as_it_was(
    harness: Harness, own_checkout: Checkout, tmp_path: Path
) -> None:
    own_checkout.write("freezing.py", FREEZING)
    harness.checkout = own_checkout
    stacks = {}
    for change in CHANGES:
        frozen, go_on = tmp_path / f"{change} frozen", tmp_path / f"{change} go on"
        imports = {"CELERY_IMPORTS": "freezing", "FROZEN": str(frozen), "GO_ON": str(go_on)}
        stack = stacks[change] = harness.stack(BEAT_SCHEDULE=OFF, **imports)
        do(stack, EACH_SECOND.format(word="old", enabled=True))
        stack.beat()
    for change, code in CHANGES.items():
        harness.wait_until((tmp_path / f"{change} frozen").exists, TIMEOUT_SECONDS, "it stands still")
        do(stacks[change], code)
        (tmp_path / f"{change} go on").touch()

    # One tick in which they find that out, and one that begins after it.
    for stack in stacks.values():
        stack.nodes[0].says("beat: ticking")
    for stack in stacks.values():
        ticks(stack.nodes[0], 2)
    for stack in stacks.values():
        assert set(sent(stack)) <= {"new"}
    client = stacks["changed"].redis.client()
    # The new crontab is due at a full minute: its score is that second, or the one before, which is read again.
    assert int(client.zscore("redbeat::schedule", "redbeat:one") or 0) % 60 in (0, 59)
    assert dump(stacks["removed"]).keys() == {"redbeat:lock"}


def test_all_entries_are_listed_beside_those_of_the_code(harness: Harness, own_checkout: Checkout) -> None:
    more = '    "other": {"task": "t", "schedule": 60.0},'
    own_checkout.replace("services/schedule.py", "]] = {\n", f"]] = {{\n{more}\n")
    harness.checkout = own_checkout
    stack = harness.stack(BEAT_SCHEDULE="report-free-space=30 2 * * sun; other=off", CELERY_TIMEZONE="Europe/Berlin")
    written = {"source": "code", "task": "services.tasks.disk.report_free_space", "schedule": "30 2 * * sun"}
    shown = services(stack, "schedule").data["schedule"][1]
    state = {"enabled": True, "last_run": None, "next_due": None, "problem": None}
    assert shown == {"name": "report-free-space", **written, **state}
    stack.beat().says("beat: ticking")
    do(stack, EACH_SECOND.format(word="listed", enabled=True))
    wait_sent(stack, "listed")
    do(
        stack,
        "Entry('once', 'no.such.task', crontab(minute={30, 0}, hour=range(9, 10)), app=app).save()\n"
        "Entry('paused', 'no.such.task', timedelta(minutes=1), enabled=False, app=app).save()\n"
        "app.redbeat_redis.hset('redbeat:broken', 'definition', '{')\n"
        "app.redbeat_redis.zadd('redbeat::schedule', {'redbeat:broken': 0})\n",
    )

    answer = services(stack, "schedule")

    assert (answer.code, answer.errors) == (0, "")
    rows = {row["name"]: row for row in answer.data["schedule"]}
    assert list(rows) == ["other", "report-free-space", "broken", "once", "one", "paused"]
    assert [row["source"] for row in rows.values()] == ["code"] * 2 + ["run time"] * 4
    assert [row["enabled"] for row in rows.values()] == [False, True, None, True, True, False]
    assert [row["schedule"] for row in rows.values()] == ["60", "30 2 * * sun", None, "0,30 9 * * *", "1", "60"]
    assert [name for name, row in rows.items() if row["last_run"]] == ["one"]
    assert [name for name, row in rows.items() if row["next_due"]] == ["report-free-space", "once", "one"]
    due = datetime.fromisoformat(rows["once"]["next_due"])
    assert (due.hour, due.minute, due.second) in ((9, 0, 0), (9, 30, 0))
    assert due.replace(tzinfo=None).replace(tzinfo=ZoneInfo("Europe/Berlin")) == due
    assert rows["broken"]["problem"].startswith("JSONDecodeError")


def test_a_schedule_that_cannot_be_listed_is_an_error_with_the_reason(stack: Stack, harness: Harness) -> None:
    answer = services(stack, "schedule", CELERY_IMPORTS="no_such_module")
    reason = "the tasks cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"
    assert (answer.code, answer.data) == (1, {"error": reason})

    without = harness.stack()
    without.redis.kill()
    answer = services(without, "schedule")
    assert answer.code == 1
    assert answer.data["error"].startswith("Redis does not answer")


def test_the_document_says_it_as_it_is(stack: Stack) -> None:
    code = block("docs/operations.md", "entry")

    do(stack, code)

    assert not stack.redis.client().exists("redbeat:nightly-report")
    (saved,) = (line for line in code.splitlines() if line.startswith("entry = "))
    assert "nightly-report" in saved


def make_app(stack: Stack, zone: str, get_now: Callable[[], datetime]) -> Celery:
    """An application with this clock, in this time zone."""
    app = create_app(load(stack.environment(CELERY_IMPORTS="", CELERY_TIMEZONE=zone)))
    app.now = lambda: get_now().astimezone(app.timezone)
    return app


def test_what_another_time_zone_or_an_earlier_release_has_saved_is_due_by_the_time_of_beat(harness: Harness) -> None:
    stack = harness.stack(BEAT_SCHEDULE=OFF)
    now = datetime(2026, 7, 1, 6, tzinfo=UTC)
    app, other = (make_app(stack, zone, lambda: now) for zone in (BERLIN, "UTC"))
    nine = RedBeatSchedulerEntry("nine", "nine", crontab(minute=0, hour=9), app=other)
    nine.save()
    RedBeatSchedulerEntry("off", "off", crontab(minute=0, hour=9), enabled=False, app=other).save()
    RedBeatSchedulerEntry("over", "over", rrule("DAILY", dtstart=now, until=now), app=other).save()
    RedBeatSchedulerEntry("never", "never", 86400, app=other).save()
    client = stack.redis.client()
    client.hset("redbeat:never", "meta", NEVER_RUN)
    # That release computed an hour too late, and did not say which of the two equal hours it saved.
    last = {"__type__": "datetime", "year": 2025, "month": 10, "day": 26, "hour": 2, "minute": 30}
    meta = {"last_run_at": last | {"second": 0, "microsecond": 0, "timezone": BERLIN}, "total_run_count": 3}
    old = definition("old", task="old", schedule=EACH_MINUTE | {"minute": 0, "hour": 8})
    client.hset("redbeat:old", mapping={"definition": old, "meta": json.dumps(meta)})
    client.zadd("redbeat::schedule", {"redbeat:old": 4e9})
    beat = LockedScheduler(app)

    def scores() -> Any:
        beat.tick()
        found: Any = client.zrange("redbeat::schedule", 0, -1, withscores=True)
        return dict(found)

    # Nine o'clock in Berlin.
    due, tomorrow = ((now + timedelta(hours=hours)).timestamp() for hours in (1, 24))
    expect = {"redbeat:nine": due, "redbeat:off": due, "redbeat:over": -1}
    expect |= {"redbeat:never": tomorrow, "redbeat:old": tomorrow}
    assert scores() == expect
    assert [len(sent(stack, task)) for task in ("never", "old")] == [1, 1]
    # Saved again in between, it is read at once.
    now += timedelta(minutes=59)
    nine.save()
    assert scores() == expect
    assert sent(stack, "nine") == []

    now += timedelta(minutes=1)

    assert scores() == expect | {"redbeat:nine": due + 86400}
    assert len(sent(stack, "nine")) == 1
    beat.close()


# A beat ticks every minute in the night of a clock change; tests/unit/services/test_summer_time.py has more.
BERLIN = "Europe/Berlin"
NIGHTS = [datetime(2026, 3, 29), datetime(2026, 10, 25)]
FORMS = {"code": "30 2 * * *", "hourly": "0 * * * *", "quarters": "*/15 1-3 * * *", "morning": "0 9 * * *"}


@pytest.mark.parametrize("night", NIGHTS)
def test_a_beat_sends_each_entry_when_it_should_in_the_night_of_a_change(harness: Harness, night: datetime) -> None:
    stack = harness.stack(CELERY_TIMEZONE=BERLIN, BEAT_SCHEDULE=f"report-free-space={FORMS['code']}")
    start = night.replace(tzinfo=ZoneInfo(BERLIN)).astimezone(UTC) - timedelta(hours=1)
    end = start + timedelta(hours=12)
    now = start
    app, other = (make_app(stack, BERLIN, lambda: now) for _ in range(2))
    for name, form in FORMS.items():
        if name != "code":
            RedBeatSchedulerEntry(name, name, crontab.from_string(form), app=other).save()
    RedBeatSchedulerEntry("interval", "interval", 300, app=other).save()
    beat = LockedScheduler(app)
    client, found = stack.redis.client(), []

    while now < end:
        beat.tick()
        while message := client.rpop("celery"):
            found.append((json.loads(str(message))["headers"]["task"], now))
        now += timedelta(minutes=1)

    beat.close()
    for name, form in FORMS.items():
        task = "services.tasks.disk.report_free_space" if name == "code" else name
        assert [moment for sender, moment in found if sender == task] == expected(form, BERLIN, start, end), name
    intervals = [moment for sender, moment in found if sender == "interval"]
    assert intervals == [start + count * timedelta(minutes=5) for count in range(1, len(intervals) + 1)]
    assert intervals[-1] == end - timedelta(minutes=5)
