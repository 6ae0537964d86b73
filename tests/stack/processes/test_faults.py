"""Faults of the local stack itself: Supervisor killed, a second Redis, a program that cannot start."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from tests.stack.deployment import MAKE_SECONDS
from tests.stack.processes.deployment import ROOT_PYTHON, Local, kill


def release_when_up_says(local: Local, text: str, label: str) -> None:
    """Run `make up`, and let a task end once it has said that."""
    command, environment = local.command("up"), local.environment()
    with subprocess.Popen(
        command, cwd=local.directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as up:
        assert up.stdout
        output = ""
        while text not in output and (line := up.stdout.readline()):
            output += line
        local.release(label)
        rest, _ = up.communicate(timeout=MAKE_SECONDS)
    assert up.returncode == 0, output + rest + local.describe()
    assert text in output, output


def test_a_killed_supervisor_leaves_tasks_running_and_up_recovers_without_a_second_redis(local: Local) -> None:
    local.redis(database=5).set("kept", "yes")
    running = local.start("orphaned")
    redis = local.pids()["redis"]
    os.kill(local.supervisor(), signal.SIGKILL)
    local.wait(lambda: not local.processes(), "Supervisor is gone")
    assert local.redis().ping(), "what it ran goes on"
    assert "left over" in local.make("status", check=False).stdout
    # What ran writes no log any more, so it is `make up` that tells when the task is about to be waited for.
    release_when_up_says(local, "that no Supervisor looks after", "orphaned")
    assert (local.notes("start", "orphaned"), local.notes("end", "orphaned")) == (1, 1)
    assert running.get()
    assert local.pids()["redis"] != redis
    assert local.redis_servers() == 1
    assert local.redis(database=5).get("kept") == "yes"
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3


@pytest.mark.slow
def test_down_ends_what_a_killed_supervisor_has_left(local: Local) -> None:
    os.kill(local.supervisor(), signal.SIGKILL)
    local.make("down")
    assert local.left() == []
    # Nothing of what it was told is there any more, and it still starts.
    local.make("scale", WORKERS="1")
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3


@pytest.mark.slow
def test_up_recovers_when_somebody_has_deleted_the_sockets(local: Local) -> None:
    before = local.pids()
    # At once: the nodes go on writing their heartbeats there.
    shutil.rmtree(local.run.rename(local.run.with_name("gone")))
    local.make("up")
    assert not set(local.pids().values()) & set(before.values())
    assert local.redis_servers() == 1
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3


@pytest.mark.slow
def test_a_supervisor_that_is_told_to_stop_by_somebody_is_waited_for(local: Local) -> None:
    local.start("told")
    before, stops = local.supervisor(), local.shutdowns()
    os.kill(before, signal.SIGTERM)
    local.wait(lambda: local.shutdowns() > stops, "the node is told to stop")
    release_when_up_says(local, "Waiting for a Supervisor that does not answer any more", "told")
    assert local.supervisor() != before
    assert (local.notes("start", "told"), local.notes("end", "told")) == (1, 1)
    assert local.redis_servers() == 1


@pytest.mark.slow
def test_after_a_crash_of_the_machine_a_torn_file_needs_nobody(local: Local) -> None:
    write = "redis.call('INCR', 'half') redis.call('RPUSH', 'halves', 'a')"
    local.redis(database=5).delete("half", "halves")
    redis = local.pids()["redis"]
    # Supervisor first, which would start them again: nothing is to write behind what is torn.
    for pid in (local.supervisor(), *(int(process.split()[0]) for process in local.left())):
        if pid != redis:
            kill(pid)
    local.wait(lambda: len(local.left()) == 1, "only Redis is left")
    client = local.redis(database=5)
    client.config_set("appendfsync", "always")
    client.eval(write, 0)
    client.eval(write, 0)
    kill(redis)
    local.wait(lambda: not local.left(), "nothing is left")
    parts = (local.state / "redis" / "appendonlydir").glob("*.incr.aof")
    file = max(parts, key=lambda path: path.stat().st_mtime, default=local.state / "redis" / "appendonly.aof")
    # Of its line EXEC: behind it Redis may have written that a key has expired.
    os.truncate(file, file.read_bytes().rindex(b"EXEC\r\n") + len("EXE"))
    local.make("up")
    assert local.redis(database=5).get("half") == "1"
    local.redis(database=5).eval(write, 0)
    local.make("stop")
    local.make("up")
    assert (local.redis(database=5).get("half"), local.redis(database=5).llen("halves")) == ("2", 2)
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3


def test_a_second_redis_does_not_touch_the_data(local: Local) -> None:
    second = subprocess.Popen(
        [ROOT_PYTHON, "-m", "stack.local.redis_server"],
        cwd=local.directory,
        env=local.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert second.stdout
        output = second.stdout.readline()
    finally:
        second.kill()
        second.wait()
    assert output == f"waiting for another Redis (pid {local.pids()['redis']}) to leave {local.state / 'redis'}\n"


@pytest.mark.slow
def test_a_program_that_cannot_start_is_shown_with_its_last_lines_and_mended_by_the_next_up(local: Local) -> None:
    # What can be imported before the start and not by what starts, as a module that needs a port may be.
    text = 'import sys\nif not sys.argv[0].endswith("check.py"):\n    raise RuntimeError("broken on purpose")\n'
    broken = local.write_task("broken", text)
    try:
        done = local.make("up", check=False)
    finally:
        broken.unlink()
    assert done.returncode == 2
    # All three import the tasks; whichever has given up first is shown.
    assert re.search(
        r"error: (worker1-node0|beat|flower) is [a-z]+ and does not work; its last lines are\n", done.stderr
    )
    assert "RuntimeError: broken on purpose" in done.stderr
    local.make("up")
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3
