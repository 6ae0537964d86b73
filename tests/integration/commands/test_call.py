"""python -m services call: one JSON object, and an exit code that tells how the task ended."""

import json
from typing import Any, NamedTuple

import pytest

from tests.support.checkout import Checkout
from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS

SUCCESS, FAILURE, BAD_INPUT, TIMED_OUT = 0, 1, 2, 3
ADD = "services.tasks.arithmetic.add"


class Answer(NamedTuple):
    """What a command printed, read as JSON, and its exit code."""

    code: int
    data: dict[str, Any]
    errors: str


def services(stack: Stack, command: str, *arguments: str, checkout: Checkout | None = None, **settings: str) -> Answer:
    """Run `python -m services COMMAND ARGUMENTS` and read what it prints: one JSON object on one line, nothing else."""
    environment, as_json = stack.environment(**settings), [] if command == "call" else ["--json"]
    done = stack.harness.answer(
        ["-m", "services", command, *as_json, *arguments], environment, TIMEOUT_SECONDS, checkout
    )
    assert done.stdout.count("\n") == 1, done
    return Answer(done.returncode, json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A worker that runs two tasks at a time."""
    stack = shared_harness.stack()
    stack.worker(WORKER_POOL="threads", WORKER_CONCURRENCY="2").ready()
    return stack


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (["--args", "[4, 3]"], 7),
        (["--kwargs", '{"x": 4, "y": 3}'], 7),
        # A whole number of any size comes through unchanged.
        (["--args", f"[{2**70}, 1]"], 2**70 + 1),
    ],
)
def test_a_result_is_printed_with_exit_code_0(stack: Stack, arguments: list[str], result: int) -> None:
    answer = services(stack, "call", ADD, *arguments)

    sent = answer.data["id"]
    assert answer == (SUCCESS, {"id": sent, "state": "SUCCESS", "result": result}, "")
    assert stack.client.AsyncResult(sent).result == result


def test_a_task_that_fails_is_an_error_with_exit_code_1(stack: Stack) -> None:
    answer = services(stack, "call", "services.tasks.primes.count_primes", "--args", "[-1]")

    assert answer.code == FAILURE
    assert answer.data["state"] == "FAILURE"
    assert answer.data["error"].startswith("ValueError: limit must be from 0")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["services.tasks.arithmetic.ad"], f"did you mean {ADD}?"),
        (["qqqq"], "there are probe.burn, "),
        ([ADD, "--args", "[4, "], "ARGS: found '[4, ', which is not JSON"),
        ([ADD, "--args", "[NaN, 1]"], "ARGS: found '[NaN, 1]', which is not JSON"),
        ([ADD, "--args", "{}"], "ARGS: found '{}'; it must be a JSON list, such as [4, 3]"),
        ([ADD, "--kwargs", "[]"], "KWARGS: found '[]'; it must be a JSON object"),
        ([ADD, "--args", "[4]"], "missing 1 required positional argument"),
        ([ADD, "--args", "[4, 3]", "--wait", "soon"], "WAIT: found 'soon'"),
        ([ADD, "--args", "[4, 3]", "--wait", "0"], "WAIT: found '0'"),
    ],
)
def test_bad_input_is_said_with_exit_code_2_and_nothing_is_sent(stack: Stack, arguments: list[str], error: str) -> None:
    answer = services(stack, "call", *arguments)

    assert answer.code == BAD_INPUT
    assert error in answer.data["error"]
    assert (answer.data["id"], answer.data["state"]) == (None, None)
    assert "Traceback" not in answer.errors


def test_a_module_that_cannot_be_imported_is_said_with_exit_code_2(stack: Stack, own_checkout: Checkout) -> None:
    own_checkout.write("broken.py", 'raise RuntimeError("broken on purpose")\n')

    answer = services(stack, "call", ADD, checkout=own_checkout, CELERY_IMPORTS="broken")

    assert answer.code == BAD_INPUT
    assert "broken on purpose" in answer.data["error"]


def test_a_task_without_a_result_in_time_is_exit_code_3(stack: Stack) -> None:
    answer = services(stack, "call", "probe.hold", "--args", '["slow"]', "--wait", "0.5")
    stack.harness.release("slow")

    assert answer.code == TIMED_OUT
    assert answer.data["state"] == "PENDING"
    assert "no result after 0.5 s" in answer.data["error"]
    assert stack.client.AsyncResult(answer.data["id"]).get(timeout=TIMEOUT_SECONDS) == "slow"


def test_a_redis_that_goes_away_during_the_wait_or_before_is_said_in_time(harness: Harness) -> None:
    stack = harness.stack()
    call = stack.command("""call probe.mark --args '["never"]' --wait 5""")
    harness.wait_until(lambda: stack.waiting() == 1, TIMEOUT_SECONDS, "the task was sent")

    stack.redis.kill()

    assert call.exits(TIMEOUT_SECONDS) in (FAILURE, TIMED_OUT)
    assert json.loads(call.process.log().splitlines()[-1])["error"]
    answer = services(stack, "call", ADD, "--args", "[4, 3]")
    assert answer.code == FAILURE
    assert "the task could not be sent" in answer.data["error"]
