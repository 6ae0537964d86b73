"""Redis ends, in one way or another, while tasks wait."""

from __future__ import annotations

from tests.stack.handle import Marks, Stack


def queue_behind_busy_children(stack: Stack) -> Marks:
    """Tasks of which two run and the others wait."""
    marks = stack.send_marks(*[[None]] * 2, *[[0]] * 6)
    marks.wait_started(2)
    return marks


def test_a_restart_of_redis_loses_no_task(stack: Stack) -> None:
    marks = queue_behind_busy_children(stack)
    stack.compose("restart", "redis")
    marks.release()
    marks.wait_finished()
    stack.wait_healthy()


def test_a_kill_of_redis_loses_no_task_that_is_queued(stack: Stack) -> None:
    stack.compose("stop", "worker")
    marks = stack.send_marks(*[[0]] * 20)
    stack.kill_redis()
    stack.compose("up", "--detach")
    marks.wait_finished()
    assert len(marks.all("started")) == 20
    stack.wait_healthy()


def test_the_health_check_of_redis_says_in_one_line_what_is_wrong(stack: Stack) -> None:
    check = "sh /etc/stalk/healthcheck; echo $?"
    assert stack.shell("redis", check) == "0\n"
    reason, code = stack.shell("redis", f"export REDIS_PASSWORD=wrong; {check}").splitlines()
    assert (code, "AUTH" in reason) == ("1", True)
