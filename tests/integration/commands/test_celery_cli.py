"""Every `celery` command on Stalk's application works, or says in a sentence what to use instead."""

import os
import re
import shlex
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from celery.bin.celery import celery
from celery.worker.control import Panel
from click import Group

from services.commands.celery_cli import NEEDS, REFUSED
from tests.support.application import create_app  # noqa: F401 - registers Stalk's own methods
from tests.support.harness import PASSWORD, Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "operations.md"
# Celery waits for one second for the answers of nodes; Stalk only until they are there.
ANSWER_SECONDS = 60
TASK = "probe.mark"
# Command → what it has to say. Each of them runs beside one node.
ANSWERS = {
    "call probe.mark -a '[\"called\"]'": r"^[0-9a-f-]{36}$",
    "call probe.mark -a '[\"later\"]' --countdown=3600 --queue=later": r"^[0-9a-f-]{36}$",
    "purge -f -Q later": "Purged 1 message|No messages purged",
    "status": "1 node online|nodes online",
    "report": "beat_scheduler: 'services.beat.scheduler:LockedScheduler'",
    "shell --python": "InteractiveConsole",
    "list bindings": r"celery\s+celery\s+celery",
    "graph bootsteps": '"SoftShutdownStep"',
    "graph workers": r'"node0@\S+" -> "redis://:\*\*\*@127',
    "inspect active": "empty",
    "inspect active_queues": "'name': 'celery'",
    "inspect clock": '"clock": ',
    "inspect conf": '"task_acks_late": true',
    "inspect ping": "pong",
    "inspect registered": TASK,
    "inspect report": "redbeat",
    "inspect reserved": "empty",
    "inspect revoked": "OK",
    "inspect stats": '"max-concurrency": ',
    "inspect scheduled": "OK",
    "inspect query_task nobody": "OK",
    "inspect held": '"held": 0',
    "control revoke nobody": "flagged as revoked",
    "control revoke_by_stamped_headers name=value": "flagged as revoked",
    "control terminate KILL nobody": "tasks unknown",
    f"control rate_limit {TASK} 100/s": "new rate limit set",
    f"control time_limit {TASK} 60 90": "time limits set",
    "control add_consumer another": "add consumer another",
    "control cancel_consumer another": "no longer consuming",
    "control disable_events": "task events disabled",
    "control enable_events": "task events( already)? enabled",
    "control pool_grow 2": "pool will grow",
    "control pool_shrink 1": "pool will shrink|the pool has shrunk by 0",
    "control autoscale 3 1": "set WORKER_AUTOSCALE",
    "control heartbeat": "OK",
}
# They do not come to an end of their own, or have a test with more in it.
OTHERS = {"worker", "beat", "multi", "events", "result", "control shutdown"}
# What is typed → what the sentence names.
MISTAKES = {
    "control rate_limit": "task_name, rate_limit is missing: it takes <task_name>",
    "control add_consumer": "queue is missing: it takes <queue>",
    "control pool_grow much": "n is 'much', not int",
    "control autoscale a b": "max is 'a', not int",
}
ELSEWHERE = {
    "amqp": "make status",
    "flower": "make up",
    "logtool stats file": "make logs",
    "migrate redis://a redis://b": "make to-plain",
    "upgrade settings file": "docs/configuration.md",
    "control election": "elect nobody",
    "control pool_restart": "celery control shutdown",
    "inspect memdump": "psutil",
    "inspect memsample": "psutil",
    "inspect objgraph": "objgraph",
}


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A node that somebody has started by hand."""
    stack = shared_harness.stack()
    stack.celery("worker --pool=prefork --concurrency=1 --hostname=node0@%h --loglevel=info --task-events").ready()
    client = stack.redis.client()
    shared_harness.wait_until(client.pubsub_numpat, TIMEOUT_SECONDS, "the node hears commands")
    # Its child takes longer on a busy machine, and what comes before that would be seen as reserved.
    stack.send(TASK, "first")
    shared_harness.wait_started("first")
    shared_harness.wait_until(lambda: stack.unacked() == 0, TIMEOUT_SECONDS, "it has ended")
    return stack


def run(stack: Stack, typed: str, *, code: int = 0) -> str:
    """What `celery -A services.app TYPED` prints, ended with this code."""
    words = shlex.split(typed)
    if not code and words[0] in ("inspect", "control", "status"):
        words.insert(1, f"--timeout={ANSWER_SECONDS}")
    command = ["-m", "celery", "--no-color", "-A", "services.app", *words]
    done = stack.harness.answer(command, stack.environment(), TIMEOUT_SECONDS)
    assert done.returncode == code, f"celery {typed}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    return done.stdout + done.stderr


def table() -> dict[str, str]:
    """Command → `works` or `refused`, as docs/operations.md has it."""
    _, found, section = DOCUMENT.read_text().partition("\n## Celery's own commands\n")
    assert found, f"{DOCUMENT} has no section on Celery's own commands"
    rows = re.findall(r"^\| (`.+?`) \| (works|refused) \|", section.partition("\n## ")[0], re.MULTILINE)
    return {command: word for commands, word in rows for command in re.findall("`(.+?)`", commands)}


def commands() -> set[str]:
    """All that Celery has, a method or a subcommand each, unless the whole command is refused."""
    found = set()
    for name, command in celery.commands.items():
        if name in ("inspect", "control"):
            found |= {
                f"{name} {one}"
                for one, meta in Panel.meta.items()
                # A test's module may have added methods to this process.
                if meta.type == name
                and meta.visible
                and Panel.data[one].__module__.startswith(("celery.", "services."))
            }
        elif isinstance(command, Group) and name not in REFUSED:
            found |= {f"{name} {one}" for one in command.commands}
        else:
            found.add(name)
    return found


def stands_for(typed: str) -> str:
    """The command of the table that is typed here."""
    two = " ".join(typed.split()[:2])
    return two if two in table() else typed.split(maxsplit=1)[0]


def test_the_document_says_of_each_command_what_is_tested_here() -> None:
    assert table().keys() == commands()
    refused = {*map(stands_for, ELSEWHERE)}
    works = {*map(stands_for, ANSWERS), *OTHERS}
    assert table() == dict.fromkeys(works, "works") | dict.fromkeys(refused, "refused")
    assert {*REFUSED, *(f"inspect {method}" for method in NEEDS)} == refused


@pytest.mark.parametrize("typed", ANSWERS)
def test_a_command_works(stack: Stack, typed: str) -> None:
    def works() -> object:
        return re.search(ANSWERS[typed], run(stack, typed), re.MULTILINE)

    if typed == "graph workers":
        # It has Celery's second, and no option for more.
        stack.harness.wait_until(works, TIMEOUT_SECONDS, "the node answers in time")
    else:
        assert works()


@pytest.mark.parametrize("typed", [*ELSEWHERE, *MISTAKES])
def test_a_command_that_cannot_work_says_so_in_a_sentence(stack: Stack, typed: str) -> None:
    output = run(stack, typed, code=2)
    assert output.startswith(f"Error: celery {stands_for(typed)}: ")
    assert output.count("\n") == 1
    assert (ELSEWHERE | MISTAKES)[typed] in output


def test_events_and_results_are_seen(stack: Stack) -> None:
    stack.celery("events --camera=celery.events.snapshot.Polaroid").says("Taking snapshots")
    stack.celery("events --dump").says("starting capture").says("heartbeat")
    events = stack.nodes[-1]
    task_id = run(stack, f"call {TASK} -a '[\"seen\"]'").strip()
    events.says(f"task succeeded: {re.escape(TASK)}.{task_id}")
    assert "seen" in run(stack, f"result {task_id}")


def test_beat_sends_by_the_stacks_schedule(stack: Stack) -> None:
    stack.celery("beat --loglevel=info --pidfile=").says("got the lock, writing the schedule")


def multi_with(executable: str) -> list[str]:
    """`celery multi`, as this interpreter runs it."""
    code = f"import sys; sys.executable = {executable!r}; from celery.__main__ import main; main()"
    return ["-c", code, "--no-color", "-A", "services.app", "multi"]


def test_multi_says_that_it_starts_nothing_whose_path_has_a_space(stack: Stack) -> None:
    done = stack.harness.answer([*multi_with("/a stalk/python"), "start", "1"], stack.environment(), TIMEOUT_SECONDS)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: celery multi: it cannot start /a stalk/python, whose path has a space: ")
    assert done.stderr.count("\n") == 1


def test_nodes_of_multi_have_a_heartbeat_and_end_when_they_are_told_to(stack: Stack, tmp_path: Path) -> None:
    """One by `control shutdown`, the other by TERM."""
    name, environment = f"m{uuid4().hex[:6]}", stack.environment()
    names = [f"{name}a", f"{name}b"]
    options = [f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n.log", "--concurrency=1", "--loglevel=info"]
    # A path without a space.
    environments = tmp_path / "python"
    environments.symlink_to(sys.prefix)
    executable = str(environments / "bin" / "python")

    def multi(*arguments: str) -> None:
        done = stack.harness.answer([*multi_with(executable), *arguments, *options], environment, TIMEOUT_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr

    def running() -> set[str]:
        return {path.stem for path in tmp_path.glob("*.pid")}

    multi("start", *names)
    beats = [Path(environment["STALK_RUN_DIR"]) / f"{one}.heartbeat" for one in names]
    stack.harness.wait_until(
        lambda: all(beat.exists() and beat.read_text() == "ready\n" for beat in beats),
        TIMEOUT_SECONDS,
        "both are ready",
    )
    assert "running tasks finish" in run(stack, f"control shutdown -d {names[0]}@{os.uname().nodename}")
    stack.harness.wait_until(lambda: running() == {names[1]}, TIMEOUT_SECONDS, f"{names[0]} has ended")
    multi("stopwait", names[1])
    assert running() == set()
