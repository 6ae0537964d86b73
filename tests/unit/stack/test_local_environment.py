"""stack.local: a command beside the stack runs in this process, where a new interpreter would be the same."""

import json
import subprocess
import sys

import pytest

from stack.local import environment
from stack.paths import ROOT

SHOW = """
import json, sys
from stack.local import processes
processes._collect_variables = lambda: json.loads(sys.argv[1])
sys.exit(processes.Processes().show("call", "--no-such-option"))
"""
SHELL = {"PATH": "/bin", "LANG": "C.UTF-8"}


@pytest.mark.parametrize(
    ("shell", "changes", "needed"),
    [
        ({}, {}, False),
        ({}, {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OWN": "1", "REDIS_PASSWORD": "secret"}, False),
        ({}, {"PYTHONHASHSEED": "0"}, True),
        ({}, {"LD_PRELOAD": "libjemalloc.so"}, True),
        ({}, {"LANG": "C"}, True),
        # What the shell has on its path is not on the stack's.
        ({"PYTHONPATH": "/elsewhere"}, {"PYTHONPATH": str(ROOT)}, True),
    ],
)
def test_what_an_interpreter_reads_at_its_start_needs_a_new_one(
    monkeypatch: pytest.MonkeyPatch, shell: dict[str, str], changes: dict[str, str], needed: bool
) -> None:
    monkeypatch.setattr(environment, "process_environment", lambda: SHELL | shell)
    assert environment.needs_new_interpreter(SHELL | shell | changes) is needed


@pytest.mark.parametrize("changes", [{}, {"PYTHONHASHSEED": "0"}], ids=["this interpreter", "a new one"])
def test_output_and_exit_code_are_those_of_the_program(changes: dict[str, str]) -> None:
    command = [sys.executable, "-c", SHOW, json.dumps(SHELL | changes)]
    done = subprocess.run(command, cwd=ROOT, env=SHELL, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: python -m services call" in done.stderr
    assert "No such option" in done.stderr
