"""make stop and down without Docker, and what a closed terminal ends: nothing."""

import fcntl
import os
import pty
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.deployment import MAKE_SECONDS
from tests.stack.processes.deployment import PROGRAMS, Local


def test_stop_lets_running_tasks_finish_and_up_runs_the_queued_ones(local: Local) -> None:
    labels = ["stopped-0", "stopped-1"]
    running = [local.start(label) for label in labels]
    queued = [local.send("services.tasks.arithmetic.add", number, 1) for number in range(20)]
    output = local.end_while(lambda: local.make("stop"), *labels).stdout
    assert "2 running; waiting for them" in output
    assert "Still queued: " in output
    assert [local.notes("end", label) for label in labels] == [1, 1]
    assert local.left() == []
    assert local.make("stop").stdout == "Nothing runs.\n"
    local.make("up")
    assert [task.get() for task in queued] == list(range(1, 21))
    assert [local.notes("start", label) for label in labels] == [1, 1]
    assert all(task.get() for task in running)


def test_down_leaves_no_process_and_keeps_the_data_and_two_ups_start_one_stack(local: Local) -> None:
    with local.redis(database=5) as client:
        client.set("kept", "yes")
    local.make("down")
    assert local.left() == []
    assert not local.run.exists()
    logs = [local.directory / f"up-{number}.log" for number in (1, 2)]
    with turn_of(local, "'make down' (pid 1)"):
        ups = [begin_up(local, log) for log in logs]
        waiting = "Waiting for 'make down' (pid 1) in this checkout …"
        local.wait(lambda: all(waiting in log.read_text() for log in logs), "both wait for the same turn")
    assert [up.wait(MAKE_SECONDS) for up in ups] == [0, 0], [log.read_text() for log in logs]
    assert sum("services.supervisor.supervise" in process for process in local.left()) == 1
    assert local.redis_servers() == 1
    assert local.redis(database=5).get("kept") == "yes"


@contextmanager
def turn_of(local: Local, name: str) -> Iterator[None]:
    """Have the turn in this checkout, as a command of this name has it."""
    with (local.state / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(name)
        lock.flush()
        yield
        lock.truncate(0)


def begin_up(local: Local, log: Path) -> subprocess.Popen[bytes]:
    """`make up`, whose output goes into a file."""
    with log.open("w") as output:
        return subprocess.Popen(
            local.command("up"),
            cwd=local.directory,
            env=local.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_a_closed_terminal_ends_nothing(local: Local) -> None:
    local.make("stop")
    pid, terminal = pty.fork()
    if pid == 0:
        # A session of its own, which hangs up with its terminal.
        os.chdir(local.directory)
        os.execvpe("sh", ["sh", "-c", "make --old-file=.venv/ready up && read line"], local.environment())
    output = b""
    while b"The stack works" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    os.waitpid(pid, 0)
    before = local.pids()
    assert sorted(before) == list(PROGRAMS)
    assert local.run_task("services.tasks.arithmetic.add", 1, 2) == 3
    assert local.pids() == before


@pytest.mark.slow
def test_a_stack_with_mistakes_in_its_env_file_can_be_seen_and_stopped(local: Local) -> None:
    kept = local.tasks_file.read_text()
    local.set_variable(local.env_file, "WORKER_POOL", "gevent")
    local.set_variable(local.tasks_file, "MISTAKE", "a \\ b")
    try:
        status = local.make("status", check=False)
        assert "warning: WORKER_POOL: found 'gevent'" in status.stderr
        assert "worker1-node0" in status.stdout
        assert "Stopped; " in local.make("stop").stdout
        assert local.left() == []
        refused = local.make("up", check=False)
        assert "error: WORKER_POOL: found 'gevent'" in refused.stderr
    finally:
        local.set_variable(local.env_file, "WORKER_POOL", "prefork")
        local.tasks_file.write_text(kept)
        local.make("up")


def test_logs_of_a_service_that_does_not_exist_are_refused(local: Local) -> None:
    asked = local.make("logs", check=False, SERVICE="nope")
    assert "error: SERVICE: found 'nope'; there are redis, worker, beat and flower" in asked.stderr
