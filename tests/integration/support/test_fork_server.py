"""A program that the fork server forks cannot be told from one that a new interpreter runs."""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY, Forked
from tests.support.harness import Harness
from tests.support.processes import Process, command_line
from tests.support.waiting import TIMEOUT_SECONDS

# Says all that a program can learn about itself; then waits, fails, becomes another program, or ends with a code.
TELL = """
import json, os, signal, sys, time

def is_open(number):
    try:
        return bool(os.fstat(number))
    except OSError:
        return False

def tell():
    environment = {name: value for name, value in os.environ.items() if name not in ("STALK_TEST_PROCESS", "LC_CTYPE")}
    print(json.dumps({
        "argv": sys.argv[1:], "main": __name__, "directory": os.getcwd(), "path": sys.path[0],
        "environment": environment,
        "own session": os.getsid(0) == os.getpid(), "zone": time.tzname[0],
        "open": [number for number in range(256) if is_open(number)],
        "input": os.readlink("/proc/self/fd/0"), "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "signals": [str(signal.getsignal(n)) for n in range(1, 32)],
    }))

tell()
word = sys.argv[1]
if word == "wait":
    time.sleep(600)
if word == "fail":
    raise ValueError("on purpose")
if word == "become":
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "tell", "4"], {"ONLY": "this"})
sys.exit(int(word) if word.isdigit() else word)
"""


@pytest.fixture
def run(harness: Harness, own_checkout: Checkout) -> Callable[[str], tuple[Process, Process]]:
    """`python -m tell WORD`, by the fork server and by an interpreter of its own."""
    own_checkout.write("tell.py", TELL)
    harness.checkout = own_checkout
    environment = {"PATH": os.environ["PATH"], "TZ": "Asia/Kolkata", "PYTHONUNBUFFERED": "1"}

    def start(word: str) -> tuple[Process, Process]:
        own_checkout.fork_server = LIBRARIES_ONLY
        forked = harness.python("tell", f"-m tell {word}", environment)
        own_checkout.fork_server = None
        executed = harness.python("tell", f"-m tell {word}", environment)
        assert [isinstance(process._popen, Forked) for process in (forked, executed)] == [True, False]
        return forked, executed

    return start


def read_told(process: Process) -> list[dict[str, Any]]:
    """What it has told of itself, once as each program that it was."""
    return [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("word", "code"), [("7", 7), ("fail", 1), ("sorry", 1), ("become", 4)], ids=["ends", "fails", "says why", "becomes"]
)
def test_it_finds_all_and_ends_as_in_a_new_interpreter(
    run: Callable[[str], tuple[Process, Process]], word: str, code: int
) -> None:
    forked, executed = run(word)

    assert [process.wait(TIMEOUT_SECONDS) for process in (forked, executed)] == [code, code]
    assert read_told(forked) == read_told(executed)
    assert forked.log().splitlines()[-1] == executed.log().splitlines()[-1]
    first, *others = read_told(forked)
    assert (first["argv"], first["zone"], first["open"]) == ([word], "IST", [0, 1, 2])
    assert [(other["argv"], other["environment"]) for other in others] == [(["4"], {"ONLY": "this"})] * (code == 4)


def test_code_on_a_command_line_finds_all_as_a_new_interpreter_does(harness: Harness, own_checkout: Checkout) -> None:
    answers = []
    for fork_server in (LIBRARIES_ONLY, None):
        own_checkout.fork_server = fork_server
        answers.append(harness.answer(["-c", TELL, "7"], {"PATH": os.environ["PATH"]}, TIMEOUT_SECONDS, own_checkout))

    forked, executed = (json.loads(answer.stdout) for answer in answers)
    assert [answer.returncode for answer in answers] == [7, 7]
    # An interpreter names its directory by an empty word there.
    assert forked == executed | {"path": str(own_checkout.path)}


def test_others_find_it_by_its_command_line_and_its_environment(
    run: Callable[[str], tuple[Process, Process]], harness: Harness
) -> None:
    for process in run("wait"):
        harness.wait_until(lambda: read_told(process), TIMEOUT_SECONDS, "it runs")  # noqa: B023

        assert command_line(process.pid) == f"{sys.executable} -m tell wait"
        assert process.family() == [process.pid]
        assert process.alive
        process.end()
        assert (process.code, process.family()) == (-signal.SIGKILL, [])
