"""The README, as it is printed: the first own task and the commands about configuration."""

import json
import subprocess

import pytest

from tests.stack.containers.deployment import Stack
from tests.stack.deployment import MAKE_SECONDS
from tests.support.documents import block, commands

DOCUMENT = "README.md"
# The clone shares the checkout's .venv, and a test must not set about installing it anew.
MAKE = 'make() { command make --silent --old-file=.venv/ready "$@"; }; '


def do(stack: Stack, command: str) -> str:
    """Run a command of the README in the clone; its standard output."""
    done = subprocess.run(
        ["bash", "-c", MAKE + command],
        cwd=stack.directory,
        env=stack.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=MAKE_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"'{command}' exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# The local stack shows the same with `make new-task` each time; a build of the image and a new start take long.
@pytest.mark.slow
def test_the_first_own_task_runs_as_printed(stack: Stack) -> None:
    (stack.directory / "services" / "tasks" / "greetings.py").write_text(block(DOCUMENT, "first-task"))
    up, call = commands(DOCUMENT, "first-task-call")
    do(stack, up)
    answer = json.loads(do(stack, call))
    assert (answer["state"], answer["result"]) == ("SUCCESS", "Hello, Ada!")


def test_the_configuration_is_checked_and_shown(stack: Stack) -> None:
    check, show = commands(DOCUMENT, "config")
    assert do(stack, check) == "The configuration is good.\n"
    assert "REDIS_PASSWORD=***" in do(stack, show)
