"""What is red, and where; and what a Ctrl-C reaches."""

import io
import signal
import sys
from pathlib import Path

import pytest

from stack import terminal


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def replace_stream(monkeypatch: pytest.MonkeyPatch, name: str, stream: io.StringIO, **variables: str) -> None:
    """Put `stream` in the place of sys.stdout or sys.stderr; of what decides about colour only `variables` are set."""
    for variable in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, name, stream)


def print_error(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **variables: str) -> str:
    replace_stream(monkeypatch, "stderr", stream, **variables)
    terminal.print_error("no engine")
    return stream.getvalue()


def test_an_error_is_red_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert print_error(monkeypatch, Screen(), TERM="xterm") == "\x1b[31merror:\x1b[0m no engine\n"
    assert print_error(monkeypatch, io.StringIO(), TERM="xterm") == "error: no engine\n"


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_somebody_who_wants_no_colour_gets_none(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert print_error(monkeypatch, Screen(), **variables) == "error: no engine\n"


def test_ctrl_c_is_the_attached_programs_and_not_ours(tmp_path: Path) -> None:
    interrupted_by_itself = (
        "import os, signal; os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
    )
    before = signal.getsignal(signal.SIGINT)
    assert terminal.run_attached([sys.executable, "-c", interrupted_by_itself], tmp_path) == -signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
