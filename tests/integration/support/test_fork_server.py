"""A program that the fork server forks cannot be told from one that a new interpreter runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY, Forked
from tests.support.processes import Process, command_line
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.world import World

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


@pytest.fixture(params=["forked", "executed"])
def run(request: pytest.FixtureRequest, world: World, own_checkout: Checkout) -> Callable[[str], Process]:
    """`python -m tell WORD`, by the fork server or by an interpreter of its own."""
    own_checkout.write("tell.py", TELL)
    own_checkout.fork_server = LIBRARIES_ONLY if request.param == "forked" else None
    world.checkout = own_checkout

    def start(word: str) -> Process:
        process = world.python(
            "tell", f"-m tell {word}", {"PATH": os.environ["PATH"], "TZ": "Asia/Kolkata", "PYTHONUNBUFFERED": "1"}
        )
        assert isinstance(process._popen, Forked) is (request.param == "forked")
        return process

    return start


def said(process: Process) -> list[dict[str, Any]]:
    """What it has told of itself, once as each program that it was."""
    return [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]


def test_it_finds_all_as_a_new_interpreter_does(run: Callable[[str], Process], world: World) -> None:
    process = run("7")

    assert process.wait(TIMEOUT_SECONDS) == 7
    (told,) = said(process)
    assert told == {
        "argv": ["7"],
        "main": "__main__",
        "directory": str(world.checkout.path),
        "path": str(world.checkout.path),
        "environment": {"PATH": os.environ["PATH"], "TZ": "Asia/Kolkata", "PYTHONUNBUFFERED": "1"},
        "own session": True,
        "zone": "IST",
        "open": [0, 1, 2],
        "input": "/dev/null",
        "blocked": 0,
        "signals": told["signals"],
    }
    ignored = {number for number, handler in enumerate(told["signals"], 1) if "SIG_IGN" in handler or handler == "1"}
    assert {signal.SIGPIPE} <= ignored <= {signal.SIGPIPE, signal.SIGXFSZ}
    assert "default_int_handler" in told["signals"][signal.SIGINT - 1]


def test_code_on_a_command_line_finds_all_as_a_new_interpreter_does(world: World, own_checkout: Checkout) -> None:
    answers = []
    for fork_server in (LIBRARIES_ONLY, None):
        own_checkout.fork_server = fork_server
        answers.append(world.answer(["-c", TELL, "7"], {"PATH": os.environ["PATH"]}, TIMEOUT_SECONDS, own_checkout))

    forked, executed = (json.loads(answer.stdout) for answer in answers)
    assert [answer.returncode for answer in answers] == [7, 7]
    # An interpreter names its directory by an empty word there.
    assert forked == executed | {"path": str(own_checkout.path)}


def test_others_find_it_by_its_command_line_and_its_environment(run: Callable[[str], Process], world: World) -> None:
    process = run("wait")
    world.wait_until(lambda: said(process), TIMEOUT_SECONDS, "it runs")

    assert command_line(process.pid) == f"{sys.executable} -m tell wait"
    assert process.family() == [process.pid]
    assert process.alive
    process.end()
    assert (process.code, process.family()) == (-signal.SIGKILL, [])


def test_what_it_dies_of_is_seen(run: Callable[[str], Process]) -> None:
    failing, speaking = run("fail"), run("sorry")

    assert (failing.wait(TIMEOUT_SECONDS), speaking.wait(TIMEOUT_SECONDS)) == (1, 1)
    assert failing.log().splitlines()[-1] == "ValueError: on purpose"
    assert speaking.log().splitlines()[-1] == "sorry"


def test_it_becomes_another_program_with_nothing_of_the_first(run: Callable[[str], Process]) -> None:
    process = run("become")

    assert process.wait(TIMEOUT_SECONDS) == 4
    first, second = said(process)
    assert (second["argv"], second["environment"]) == (["4"], {"ONLY": "this"})
    kept = ("main", "directory", "path", "own session", "open", "input", "blocked")
    assert [second[name] for name in kept] == [first[name] for name in kept]
    assert second["zone"] == "UTC"
    # What was caught is at its default again, and what was ignored is ignored.
    assert second["signals"][signal.SIGTERM - 1] == first["signals"][signal.SIGTERM - 1]
    assert second["signals"][signal.SIGUSR1 - 1] == first["signals"][signal.SIGPIPE - 1]
