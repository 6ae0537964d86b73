"""The stack that the tests here share: one copy of the checkout, started by its first `make up`."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.local.handle import HERE, PROGRAMS, Local
from tests.support.task_modules import probe


@pytest.fixture(scope="session")
def first_up() -> Iterator[tuple[Local, str]]:
    """The stack after its first `make up`, and what that printed."""
    # pytest's own directories have long names, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:
        local = Local(Path(base))
        prepare(local)
        try:
            yield local, local.make("up").stdout
        finally:
            local.make("clean", check=False, YES="1")
            left = local.left()
            for process in left:
                # What `make clean` leaves is a fault, and still must not stay.
                kill(int(process.split()[0]))
        assert not left, f"make clean has left {left}"
        assert sorted(local.home.iterdir()) == []
        assert sorted(local.scratch.iterdir()) == []


def prepare(local: Local) -> None:
    """The checkout of somebody who has begun to work: tasks and variables of their own."""
    shutil.copy(probe.__file__, local.directory / "own_probe.py")
    shutil.copy(HERE / "seen.py", local.directory / "services" / "tasks" / "seen.py")
    # The answer of a node on a busy machine.
    local.replace("services/commands/status.py", "\nANSWER_SECONDS = 1.0", "\nANSWER_SECONDS = 60.0")
    local.tasks_file.write_text(
        f"PROBE_LOG='{str(local.directory / 'probe.log').replace(chr(39), chr(92) + chr(39))}'\n"
    )


def kill(pid: int) -> None:
    """Kill a process that may have gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def local(first_up: tuple[Local, str]) -> Local:
    """The shared stack with one worker, everything running, and empty queues; settings may differ from test to test."""
    local, _ = first_up
    if not all_run(local):
        local.set_variable(local.env_file, "WORKERS", "1")
        (local.state / "runtime").write_text("local\n")
        local.make("up")
    local.redis().delete("celery", "unacked", "unacked_index")
    return local


def all_run(local: Local) -> bool:
    """Whether there is one of each program, and it runs."""
    states = {name: process["statename"] for name, process in local.processes().items()}
    words = [path.read_text().strip() for path in local.run.glob("*.heartbeat")]
    return (
        sorted(states) == list(PROGRAMS)
        and set(states.values()) <= {"RUNNING", "STARTING"}
        and sorted(words) == ["ready", "ready", "ticking"]
    )


@pytest.fixture
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Local]]:
    """Makes a checkout in which nothing has been started; nothing may run in it afterwards."""
    made: list[Local] = []
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:

        def make(name: str = "checkout") -> Local:
            made.append(Local(Path(base), name))
            return made[-1]

        yield make
        assert [local.left() for local in made] == [[] for _ in made]
