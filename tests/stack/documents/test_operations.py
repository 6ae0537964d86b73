"""docs/operations.md, step by step, as it is printed."""

import subprocess
from collections.abc import Mapping
from functools import partial

import pytest

from tests.stack.containers.deployment import Stack
from tests.stack.deployment import MAKE_SECONDS, run
from tests.support.documents import commands, names

DOCUMENT = "docs/operations.md"
# The clone shares the checkout's .venv, and a test must not set about installing it anew.
MAKE = 'make() { command make --old-file=.venv/ready "$@"; }; '
# What `celery control` exits with then; whoever asks again does no harm.
NOBODY_ANSWERS = 69
TESTED_HERE = {
    "scaling",
    "stopping",
    "logs",
    "password",
    "upgrade-redis",
    "copy-data",
    "restore-data",
    "disk",
    "memory",
    "purge",
    "dead-letters",
    "to-plain",
    "schedule",
    "unread-queue",
    "unread-queue-back",
    "unread-priority",
    "overtime",
}
# By tests/integration/beat/test_entries.py and tests/stack/services/test_workers.py.
TESTED_THERE = {"entry", "second-worker"}


def do(stack: Stack, name: str, **variables: str) -> str:
    """Run a block's commands in the clone, one after the other, with variables of the shell; what they printed."""
    printed = []
    for command in commands(DOCUMENT, name):
        done = stack.wait(partial(unless_no_node_answers, stack, command, variables), f"a node answers '{command}'")
        assert done, command
        assert done.returncode == 0, f"'{command}' exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout + done.stderr)
    return "\n".join(printed)


def unless_no_node_answers(
    stack: Stack, command: str, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str] | None:
    """Run a command in the clone; None when Celery has waited for a node's answer in vain, for 1 s."""
    done = run(["bash", "-c", MAKE + command], stack.directory, stack.environment(**variables), MAKE_SECONDS)
    return None if done.returncode == NOBODY_ANSWERS else done


def test_every_block_of_the_document_is_run_here() -> None:
    assert set(names(DOCUMENT)) == TESTED_HERE | TESTED_THERE


def test_scaling(stack: Stack) -> None:
    printed = do(stack, "scaling")
    assert len(stack.ids("worker")) == 2
    assert "2 workers run" in printed
    stack.make("scale", WORKERS="1")


@pytest.mark.slow
def test_stopping_keeps_what_is_queued(stack: Stack) -> None:
    stack.compose("stop", "worker")
    marks = stack.send_marks([0.0])
    printed = do(stack, "stopping")
    assert "Still queued: 1 in celery." in printed
    marks.wait_finished()


def test_logs(stack: Stack) -> None:
    answer, _ = stack.call("services.tasks.arithmetic.add", 4, 3)
    stack.wait(lambda: str(answer["id"]) in stack.logs("worker"), "the task in the log, which may follow its result")
    # What it ran last is among its last lines.
    assert str(answer["id"]) in do(stack, "logs")


@pytest.mark.slow
def test_a_new_redis_password_is_taken_over(stack: Stack) -> None:
    before = stack.env_file.read_text()
    stack.compose("stop", "worker")
    marks = stack.send_marks([0.0])
    try:
        do(stack, "password")
        assert stack.environment_of("worker")["REDIS_PASSWORD"] == "another-long-password"
        marks.wait_finished()
    finally:
        stack.env_file.write_text(before)
        stack.make("up")


@pytest.mark.slow
def test_another_redis_image_goes_on_with_the_data(stack: Stack) -> None:
    before = stack.env_file.read_text()
    image = stack.inspect(stack.ids("redis")[0])["Config"]["Image"]
    stack.docker("tag", image, "your-registry/redis:8.8.2")
    stack.compose("stop", "worker")
    marks = stack.send_marks([0.0])
    try:
        do(stack, "upgrade-redis")
        assert stack.inspect(stack.ids("redis")[0])["Config"]["Image"] == "your-registry/redis:8.8.2"
        marks.wait_finished()
    finally:
        stack.env_file.write_text(before)
        stack.make("up")
        stack.docker("image", "rm", "your-registry/redis:8.8.2")


@pytest.mark.slow
def test_queued_tasks_move_to_another_host_with_the_data(stack: Stack, other_stack: Stack) -> None:
    stack.compose("stop", "worker")
    stack.send_marks([0.0])
    do(stack, "copy-data")
    other_stack.env_file.write_text(stack.env_file.read_text())
    (other_stack.directory / "redis-data.tar").write_bytes((stack.directory / "redis-data.tar").read_bytes())
    # The other host has no such task; that its message is there is what counts.
    other_stack.settings["WORKERS"] = "0"
    do(other_stack, "restore-data")
    assert other_stack.queued() == 1


@pytest.mark.parametrize("name", ["disk", "memory"])
def test_looking_at_what_is_full(stack: Stack, name: str) -> None:
    printed = do(stack, name)
    assert ("/data" in printed) if name == "disk" else ("maxmemory_policy:noeviction" in printed)


def test_emptying_a_queue(stack: Stack) -> None:
    # Both children are busy, so what comes after waits in the queue.
    marks = stack.send_marks([None], [None])
    marks.wait_started(2)
    stack.send("services.tasks.arithmetic.add", [1, 2], [3, 4])
    assert stack.queued() == 2
    do(stack, "purge")
    assert stack.queued() == 0
    marks.release()
    marks.wait_finished()


def test_workers_take_from_a_queue_that_nobody_read(stack: Stack) -> None:
    marks = stack.send_marks([0], [0], queue="mial")
    assert "No node reads mial: 2 tasks wait there" in stack.make("status").stdout
    do(stack, "unread-queue")
    marks.wait_finished()
    assert "mial" in stack.make("status").stdout
    do(stack, "unread-queue-back")
    marks = stack.send_marks([0], queue="mial")
    assert "No node reads mial: 1 task waits there" in stack.make("status").stdout
    stack.redis("DEL", "mial")


def test_tasks_of_a_priority_that_nobody_reads_are_moved(stack: Stack) -> None:
    marks = stack.send_marks([0], [0], [0], queue="mial")
    stack.redis("RENAME", "mial", "celery\x06\x161")
    assert "No node reads celery, priority 1 (" in stack.make("status").stdout
    do(stack, "unread-priority")
    marks.wait_finished()
    assert "No node reads" not in stack.make("status").stdout


@pytest.mark.slow
def test_a_task_that_nothing_else_ends_ends_with_its_node(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-deps", "worker", variables={"WORKER_POOL": "threads"})
    stack.wait_healthy()
    try:
        marks = stack.send_marks([None], time_limit=1)
        (task,) = marks.tasks
        marks.wait_started()
        shown = f"[{task}] for "
        stack.wait(lambda: shown in stack.make("status").stdout, "the task over its limit")
        do(stack, "overtime", ID=task)
        stack.wait_healthy()
        stack.wait(lambda: "REVOKED" in stack.redis("GET", f"celery-task-meta-{task}", database=1), "it is revoked")
        assert (len(marks.all("started")), len(marks.unfinished())) == (1, 1)
        stack.wait(lambda: shown not in stack.make("status").stdout, "none over its limit")
    finally:
        stack.compose("up", "--detach", "--no-deps", "worker")


def test_dead_letters_are_seen_and_replayed(stack: Stack) -> None:
    # The document speaks of the first one.
    stack.redis("DEL", "dead_letters_next")
    stack.redis("LPUSH", "celery", "no JSON")
    stack.wait(lambda: stack.redis("ZCARD", "dead_letters") == "1", "a dead letter")
    printed = do(stack, "dead-letters")
    assert "undecodable" in printed
    assert "1 dead letter is back in the queues." in printed
    # It is no JSON now either.
    stack.wait(lambda: stack.redis("ZRANGE", "dead_letters", "0", "-1") == "2", "another dead letter")
    assert stack.purge_dead_letters() == "1 dead letter is deleted.\n"


def test_the_schedule_is_listed(stack: Stack) -> None:
    assert "report-free-space" in do(stack, "schedule")


@pytest.mark.slow
def test_all_goes_back_to_plain_queues(stack: Stack) -> None:
    stack.send("services.tasks.arithmetic.add", [1, 2], countdown=3600)
    stack.wait(lambda: stack.redis("ZCARD", "scheduled") == "1", "a task that waits for its time")
    assert "Back in the queues: 1 tasks that waited for their time" in do(stack, "to-plain")
    assert (stack.redis("ZCARD", "scheduled"), stack.queued()) == ("0", 1)
    stack.redis("DEL", "celery")
    stack.make("scale", WORKERS="1")
