"""Redis ends, in one way or another, while tasks wait."""

from __future__ import annotations

from tests.stack.handle import Marks, Stack


def queue_behind_busy_children(stack: Stack) -> Marks:
    """Tasks of which two run and the others wait."""
    marks = stack.send_marks(*[[1]] * 8)
    marks.wait_started(2)
    return marks


def test_a_restart_of_redis_loses_no_task(stack: Stack) -> None:
    marks = queue_behind_busy_children(stack)
    stack.compose("restart", "redis")
    marks.wait_finished()
    stack.wait_healthy()


def test_a_kill_of_redis_loses_no_task_that_is_queued(stack: Stack) -> None:
    stack.compose("stop", "worker")
    marks = stack.send_marks(*[[0]] * 20)
    stack.save_redis()
    redis = stack.ids("redis")[0]
    stack.docker("kill", "--signal=KILL", redis)
    # 128 and the signal's number.
    assert stack.inspect(redis)["State"]["ExitCode"] == 137
    stack.compose("up", "--detach")
    marks.wait_finished()
    assert len(marks.all("started")) == 20
    stack.wait_healthy()


def test_a_redis_that_cannot_write_is_unhealthy(stack: Stack) -> None:
    check = "/etc/stalk/healthcheck"
    assert stack.shell("redis", f"sh {check}") == ""
    told = stack.shell("redis", f"REDIS_PASSWORD=wrong sh {check}; echo $?").split("\n")
    assert told[-2] == "1"
    assert told[0].startswith("it cannot write:")
