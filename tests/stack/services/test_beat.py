"""Beat sends once, however many of it there are; and a node or a beat that stands still or dies is replaced."""

import re
from dataclasses import dataclass

import pytest

from services.broker.keys import BEAT_LOCK
from tests.stack.containers.deployment import Stack

# A lock that runs out and a watchdog that is patient take most of a minute; tests/integration has both, shorter.
pytestmark = pytest.mark.slow
SENDING = "beat: sent report-free-space"
# Nobody takes over while the lock lasts, and the README promises 30 s; the standby looks every 2 s.
LONGEST_LOCK_MILLISECONDS = 28_000


def word(stack: Stack, beat: str) -> str:
    """What a beat says about itself in its heartbeat."""
    return stack.docker("exec", beat, "cat", "/run/stalk/beat.heartbeat", check=False).strip()


def sent(stack: Stack, beat: str) -> int:
    """How often a beat has sent the periodic task."""
    return stack.docker("logs", beat).count(SENDING)


@dataclass
class Beats:
    """Two beats with an entry that is due each second."""

    stack: Stack
    deliveries: str
    standby: str


@dataclass
class Faults:
    """A node that stands still and a beat that is dead, since the same moment."""

    beats: Beats
    node: int
    worker: str


@pytest.fixture(scope="module")
def two_beats(first_stack: tuple[Stack, str]) -> Beats:
    """The mistake that the lock is for."""
    stack, _ = first_stack
    stack.settle()
    often = {"BEAT_SCHEDULE": "report-free-space=1"}
    stack.compose("up", "--detach", "--no-deps", "--scale", "beat=2", "beat", variables=often)
    beats = stack.ids("beat")

    def by_word() -> dict[str, str] | None:
        found = {word(stack, beat): beat for beat in beats}
        return found if sorted(found) == ["standby", "ticking"] else None

    roles = stack.wait(by_word, "one ticks, one waits")
    assert roles
    return Beats(stack, deliveries=roles["ticking"], standby=roles["standby"])


@pytest.fixture(scope="module")
def faults(two_beats: Beats) -> Faults:
    """Both at once, because each of them takes its time to be noticed."""
    stack, worker, node = two_beats.stack, two_beats.stack.ids("worker")[0], two_beats.stack.node_pid()
    assert 0 < int(stack.redis("PTTL", BEAT_LOCK)) <= LONGEST_LOCK_MILLISECONDS
    stack.shell("worker", f"kill -STOP {node}")
    stack.docker("kill", "--signal=KILL", two_beats.deliveries)
    assert stack.inspect(two_beats.deliveries)["State"]["ExitCode"] == 137
    assert stack.shell("worker", f"cut -d' ' -f3 /proc/{node}/stat").strip() == "T"
    return Faults(two_beats, node, worker)


def test_of_two_beats_one_sends_and_both_are_healthy(two_beats: Beats) -> None:
    stack = two_beats.stack
    stack.wait(lambda: sent(stack, two_beats.deliveries) >= 5, "five sent")
    stack.wait_healthy("beat")
    assert sent(stack, two_beats.standby) == 0
    assert "Beat: last tick" in stack.make("status").stdout


def test_the_periodic_task_runs_as_often_as_it_was_sent(two_beats: Beats) -> None:
    stack, deliveries = two_beats.stack, two_beats.deliveries
    before = sent(stack, deliveries)
    stack.wait(lambda: len(received(stack)) > before, "what was sent is received")
    ids = received(stack)
    assert len(ids) == len(set(ids)), "one was sent or taken twice"
    # Beat says of a task that it is sent when it may have been received already.
    stack.wait(lambda: sent(stack, deliveries) >= len(ids), "as many were sent")


def test_the_standby_sends_when_the_holder_was_killed(faults: Faults) -> None:
    stack, beats = faults.beats.stack, faults.beats
    before = sent(stack, beats.deliveries)
    stack.wait(lambda: sent(stack, beats.standby) > 0, "the standby sends")
    # At the end of the tick in which it sends.
    stack.wait(lambda: word(stack, beats.standby) == "ticking", "it says so")
    assert sent(stack, beats.deliveries) == before


def test_a_node_that_stands_still_is_killed_and_replaced(faults: Faults) -> None:
    stack = faults.beats.stack
    stack.wait(lambda: stack.node_pid() not in (faults.node, 0), "another process is node0")
    stack.wait(lambda: "watchdog: killing node0 (pid" in stack.logs("worker"), "the watchdog says so")
    assert stack.call("services.tasks.arithmetic.add", 4, 3)[1] == 0
    stack.wait_healthy("worker")
    # The container is the same: its other nodes would have gone on.
    assert stack.ids("worker") == [faults.worker]
    assert stack.inspect(faults.worker)["RestartCount"] == 0


def received(stack: Stack) -> list[str]:
    """The ids of the periodic task, once for each time that a worker has received it."""
    return re.findall(r"Task services\.tasks\.disk\.report_free_space\[([^]]+)\] received", stack.logs("worker"))
