"""Redis ends, in one way or another, while tasks wait."""

from tests.stack.containers.deployment import Marks, Stack


def queue_behind_busy_children(stack: Stack) -> Marks:
    """Tasks of which two run and the others wait."""
    marks = stack.send_marks(*[[None]] * 2, *[[0]] * 6)
    marks.wait_started(2)
    return marks


def test_a_restart_of_redis_loses_no_task(stack: Stack) -> None:
    marks = queue_behind_busy_children(stack)
    stack.compose("restart", "redis")
    # It was started, and does not listen yet.
    stack.wait_healthy("redis")
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


def test_a_torn_file_costs_no_more_than_the_transaction_without_its_end(stack: Stack) -> None:
    stack.compose("stop", "worker", "beat")
    marks = stack.send_marks(*[[0]] * 5)
    # Nothing is to write behind the transaction that is torn.
    stack.compose("stop", "flower")
    write = "redis.call('INCR', 'half') redis.call('RPUSH', 'halves', 'a')"
    stack.redis("DEL", "half", "halves")
    stack.redis("EVAL", write, "0")
    stack.redis("EVAL", write, "0")
    stack.kill_redis()
    # Of its line EXEC: behind it Redis may have written that a key has expired.
    tear = (
        "cd /data/appendonlydir && file=$(ls -t *.incr.aof | head -n 1) &&"
        " line=$(grep --text --byte-offset --only-matching EXEC $file | tail -n 1) &&"
        " truncate --size $((${line%:EXEC} + 3)) $file"
    )
    stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "sh", "redis", "-c", tear)
    stack.compose("up", "--detach", "redis")
    stack.wait_healthy("redis")
    assert "of a transaction without its end" in stack.logs("redis")
    assert stack.redis("GET", "half") == "1"
    stack.redis("EVAL", write, "0")
    stack.compose("restart", "redis")
    stack.wait_healthy("redis")
    assert (stack.redis("GET", "half"), stack.redis("LLEN", "halves")) == ("2", "2")
    stack.compose("up", "--detach")
    marks.wait_finished()
    assert len(marks.all("started")) == 5


def test_the_health_check_of_redis_says_in_one_line_what_is_wrong(stack: Stack) -> None:
    check = "sh /etc/stalk/healthcheck; echo $?"
    assert stack.shell("redis", check) == "0\n"
    reason, code = stack.shell("redis", f"export REDIS_PASSWORD=wrong; {check}").splitlines()
    assert (code, "AUTH" in reason) == ("1", True)
