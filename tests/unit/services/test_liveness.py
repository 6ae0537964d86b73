"""services.worker.heartbeat.Liveness: alive, waiting or stuck."""

import pytest

from services.supervisor.heartbeat_file import READY, STARTING, STUCK, WAITING
from services.worker.heartbeat import BEAT_SECONDS, Liveness

TIMEOUT = 60


class Node:
    """A node under judgement, in a time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now, self.loops, self.redis_answers, self.pings = 0.0, 0, True, 0
        self.liveness = Liveness(self._ping, TIMEOUT, clock=lambda: self.now)

    def _ping(self) -> bool:
        self.pings += 1
        return self.redis_answers

    def pass_time(self, seconds: float, looping: bool = False, excused: bool = False) -> list[str]:
        """The judgements of so many seconds, one each BEAT_SECONDS."""
        judgements = []
        for _ in range(int(seconds / BEAT_SECONDS)):
            self.now += BEAT_SECONDS
            self.loops += looping
            judgements.append(self.liveness.judge(self.loops, excused, started=True))
        return judgements


@pytest.fixture
def node() -> Node:
    """A node that has just been seen at work."""
    node = Node()
    assert node.liveness.judge(node.loops, excused=False, started=True) == READY
    return node


def test_a_node_whose_loop_runs_is_ready_and_redis_is_not_asked(node: Node) -> None:
    assert set(node.pass_time(10 * TIMEOUT, looping=True)) == {READY}
    assert node.pings == 0


def test_a_node_whose_loop_has_not_run_yet_is_starting() -> None:
    assert Node().liveness.judge(0, excused=False, started=False) == STARTING


def test_a_loop_that_stands_still_is_stuck_after_the_timeout_and_not_before(node: Node) -> None:
    first, *others = node.pass_time(TIMEOUT)
    assert (first, set(others)) == (READY, {WAITING})
    assert set(node.pass_time(TIMEOUT)) == {STUCK}
    assert node.pass_time(BEAT_SECONDS, looping=True) == [READY]


def test_an_outage_of_redis_is_waited_for_however_long_it_is_and_the_timeout_starts_anew(node: Node) -> None:
    node.redis_answers = False
    first, *others = node.pass_time(10 * TIMEOUT)
    assert (first, set(others)) == (READY, {WAITING})
    node.redis_answers = True
    assert set(node.pass_time(TIMEOUT)) == {WAITING}
    assert node.pass_time(BEAT_SECONDS) == [STUCK]


def test_a_node_with_an_excuse_may_stand_still_and_the_timeout_starts_anew(node: Node) -> None:
    assert set(node.pass_time(10 * TIMEOUT, excused=True)) == {READY}
    assert STUCK not in node.pass_time(TIMEOUT)
