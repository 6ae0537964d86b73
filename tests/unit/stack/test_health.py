"""When a unit of the local stack counts as working."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import paths, readiness
from stack.errors import CommandError
from stack.local import session
from stack.local.health import measure_age, read_heartbeat_health
from stack.local.processes import Processes
from stack.runtime import Unit
from tests.support.waiting import wait_until


@pytest.fixture
def heartbeat(elsewhere: Path) -> Path:
    """The heartbeat file of the program `node`."""
    paths.RUN.mkdir(parents=True)
    return paths.RUN / "node.heartbeat"


@pytest.fixture
def young() -> Iterator[int]:
    """A process that has just been started."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def health(pid: int) -> str:
    return read_heartbeat_health("node", pid)


def say(heartbeat: Path, word: str, seconds_ago: float = 0) -> None:
    heartbeat.write_text(word + "\n")
    then = time.time() - seconds_ago
    os.utime(heartbeat, (then, then))


# Process 1 is as old as the machine, so every heartbeat can be its own.
@pytest.mark.parametrize(
    ("word", "seconds_ago", "expected"),
    [
        ("ready", 0, "healthy"),
        ("waiting", 20, "healthy"),
        ("ready", 31, "unhealthy"),
        ("starting", 0, "starting"),
        ("stuck", 0, "unhealthy"),
        ("", 0, "unhealthy"),
    ],
)
def test_a_heartbeat_tells_what_docker_s_health_check_tells(
    heartbeat: Path, word: str, seconds_ago: float, expected: str
) -> None:
    say(heartbeat, word, seconds_ago)
    assert health(1) == expected


def test_before_its_first_heartbeat_a_program_is_starting(heartbeat: Path) -> None:
    assert health(1) == "starting"


def test_the_heartbeat_of_its_predecessor_says_nothing_of_a_new_process(heartbeat: Path, young: int) -> None:
    # Young enough to be a healthy one's, and older than a process that had to wait for its turn.
    say(heartbeat, "ready", seconds_ago=25)
    assert health(young) == "starting"

    def its_own() -> bool:
        say(heartbeat, "ready")
        return health(young) == "healthy"

    # Whoever is kept from looking at once takes it for the predecessor's, until the next one.
    wait_until(its_own, 60, "a heartbeat of its own is known")


def test_the_age_of_a_process_is_right(young: int) -> None:
    # From the youngest on, so that whatever passes between two looks makes the older one older.
    ages = [measure_age(pid) for pid in (young, os.getpid(), 1)]
    assert 0 <= ages[0] < 30
    assert ages[0] <= ages[1] < ages[2]


def test_a_record_of_another_start_process_or_checkout_names_nobody(elsewhere: Path) -> None:
    paths.STATE.mkdir()
    assert session.list_processes() == []
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as ours:
        session.record(ours.pid, "kind")
        assert [process.pid for process in session.list_processes()] == [ours.pid]
        assert session.read_kind() == "kind"
        pid, born, boot, kind, root = paths.SESSION.read_text().rstrip().split(" ", 4)
        others = (
            f"{pid} {int(born) + 1} {boot} {kind} {root}",
            f"{pid} {born} another-boot {kind} {root}",
            f"{pid} {born} {boot} {kind} {root}/copy",
            "nonsense",
        )
        for other in others:
            paths.SESSION.write_text(other)
            assert session.list_processes() == []
        ours.kill()


class Stopped(Processes):
    """A stack that somebody has stopped."""

    def list_units(self) -> list[Unit]:
        return []


def test_nothing_that_does_not_run_works() -> None:
    with pytest.raises(CommandError, match="nothing runs any more"):
        readiness.wait_until_healthy(Stopped())
