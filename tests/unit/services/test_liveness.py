"""services.worker.heartbeat.Liveness: alive, waiting or stuck."""

from __future__ import annotations

import pytest

from services.supervisor.heartbeat_file import READY, STARTING, STUCK, WAITING
from services.worker.heartbeat import BEAT_SECONDS, Liveness

TIMEOUT = 60


class Node:
    """A node under judgement, in a time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now, self.turns, self.redis, self.pings = 0.0, 0, True, 0
        self._liveness = Liveness(self._answers, TIMEOUT, clock=lambda: self.now)

    def _answers(self) -> bool:
        self.pings += 1
        return self.redis

    def judge(self, excused: bool = False, started: bool = True) -> str:
        return self._liveness.judge(self.turns, excused, started)

    def pass_time(self, seconds: float, turning: bool = False, excused: bool = False) -> list[str]:
        """The words of so many seconds, a judgement every BEAT_SECONDS."""
        words = []
        for _ in range(int(seconds / BEAT_SECONDS)):
            self.now += BEAT_SECONDS
            self.turns += turning
            words.append(self.judge(excused))
        return words


@pytest.fixture
def node() -> Node:
    """A node that has just been seen at work."""
    node = Node()
    assert node.judge() == READY
    return node


def test_a_node_whose_loop_turns_is_ready_and_redis_is_not_asked(node: Node) -> None:
    assert set(node.pass_time(10 * TIMEOUT, turning=True)) == {READY}
    assert node.pings == 0


def test_a_node_that_has_not_turned_yet_is_starting() -> None:
    assert Node().judge(started=False) == STARTING


def test_a_loop_that_stands_still_is_stuck_after_the_timeout_and_not_before(node: Node) -> None:
    words = node.pass_time(TIMEOUT)

    assert words[0] == READY
    assert set(words[1:]) == {WAITING}
    assert node.pass_time(BEAT_SECONDS) == [STUCK]


def test_a_stuck_loop_that_turns_again_is_ready(node: Node) -> None:
    assert node.pass_time(2 * TIMEOUT)[-1] == STUCK

    assert node.pass_time(BEAT_SECONDS, turning=True) == [READY]


def test_an_outage_of_redis_is_waited_for_however_long_it_is(node: Node) -> None:
    node.redis = False

    words = node.pass_time(10 * TIMEOUT)

    assert words[0] == READY
    assert set(words[1:]) == {WAITING}


def test_the_timeout_starts_anew_when_redis_is_back(node: Node) -> None:
    node.redis = False
    node.pass_time(10 * TIMEOUT)
    node.redis = True

    assert set(node.pass_time(TIMEOUT)) == {WAITING}
    assert node.pass_time(BEAT_SECONDS) == [STUCK]


def test_a_node_with_an_excuse_may_stand_still(node: Node) -> None:
    assert set(node.pass_time(10 * TIMEOUT, excused=True)) == {READY}


def test_the_timeout_starts_anew_after_an_excuse(node: Node) -> None:
    node.pass_time(10 * TIMEOUT, excused=True)

    assert STUCK not in node.pass_time(TIMEOUT)
