"""make stop, down and up: running tasks end, queued ones wait."""

from tests.stack.containers.deployment import Stack
from tests.stack.services.test_workers import SOLO

# On a machine that is busy with much else.
IN_NO_HURRY = """
  beat: {stop_grace_period: 120s}
  flower: {stop_grace_period: 120s}
"""


def test_running_tasks_finish_before_make_stop_and_queued_ones_survive_make_down(with_long_grace: Stack) -> None:
    stack = with_long_grace
    # A node with a task in its solo pool answers nobody.
    stack.override.write_text("services:" + SOLO + IN_NO_HURRY)
    stack.compose("up", "--detach")
    stack.wait_healthy()
    marks, solo = stack.send_marks([None], [None], *[[0]] * 5), stack.send_marks([None], queue="one")
    marks.wait_started(2)
    solo.wait_started()
    output = stack.stop_while_they_run(lambda: stack.make("stop"), marks, solo).stdout
    assert "2 running, 1 more held by workers (waiting for its time, or in a solo pool); waiting for them" in output
    assert "Workers have stopped. Still queued: 5 in celery." in output
    assert {container["State"] for container in stack.containers()} == {"exited"}
    assert {stack.inspect(identifier)["State"]["ExitCode"] for identifier in stack.ids()} == {0}
    assert stack.make("stop").stdout == "Nothing runs.\n"
    stack.make("down")
    assert "ps" not in stack.remains()
    stack.make("up")
    marks.wait_finished()
    # Each of them once: what had finished before the stop was not begun anew.
    assert len(marks.all("started")) == 7
    assert (len(solo.all("started")), solo.unfinished()) == (1, set())


def test_commands_on_a_stack_that_does_not_run_say_how_to_start_it(other_stack: Stack) -> None:
    other_stack.env_file.write_text("REDIS_PASSWORD=x\nFLOWER_BASIC_AUTH=a:b\n")
    for target in ("call", "status", "shell"):
        done = other_stack.make(target, check=False, TASK="services.tasks.arithmetic.add")
        assert done.returncode == 2
        assert "error: the stack is not running: start it with 'make up'" in done.stderr.splitlines()
    assert other_stack.make("stop").stdout == "Nothing runs.\n"
    assert other_stack.remains() == {}
