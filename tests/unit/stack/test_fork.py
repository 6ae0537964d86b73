"""stack.local.fork: a fork of this process in place of a new interpreter, where both would be the same."""

from __future__ import annotations

import pytest

from stack.local import fork
from stack.paths import ROOT

SHELL = {"PATH": "/bin", "LANG": "C.UTF-8"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OWN": "1", "REDIS_PASSWORD": "secret"}, True),
        ({"PYTHONHASHSEED": "0"}, False),
        ({"LD_PRELOAD": "libjemalloc.so"}, False),
        ({"LANG": "C"}, False),
    ],
)
def test_what_an_interpreter_reads_at_its_start_needs_a_new_one(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], same: bool
) -> None:
    monkeypatch.setattr(fork, "process_environment", lambda: SHELL)
    assert fork.can_copy(SHELL | changes) is same


def test_a_path_of_the_shell_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "process_environment", lambda: SHELL | {"PYTHONPATH": "/elsewhere"})
    assert not fork.can_copy(SHELL | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("changes", [{}, {"PYTHONHASHSEED": "0"}], ids=["copy", "new interpreter"])
def test_output_and_exit_code_are_those_of_the_program(changes: dict[str, str]) -> None:
    done = fork.capture(("call", "--no-such-option"), SHELL | changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: python -m services call" in done.stderr
    assert "No such option" in done.stderr
