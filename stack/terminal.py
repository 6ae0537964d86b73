"""What people see: red only where a terminal shows it, and programs that have the terminal to themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from config.environment import shows_colour
from stack.errors import Failure

RED, YELLOW, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"


def ask_to_delete(what: str, command: str) -> None:
    """Have somebody say yes to the end of `what`; `command` is the one that does without.

    Raises Failure when nobody can be asked, or says anything else.
    """
    if not sys.stdin.isatty():
        raise Failure(f"this deletes all {what}, and nobody can be asked: run '{command}'")
    if input(f"This deletes all {what} for ever. Type yes to go on: ") != "yes":
        raise Failure("nothing was deleted")


def error(text: str) -> None:
    """Say on standard error what is wrong."""
    _say("error:", RED, text, sys.stderr)


def warning(text: str, stream: TextIO | None = None) -> None:
    """Say what is not as it should be and stops nothing; on standard output unless that is for JSON."""
    _say("warning:", YELLOW, text, stream or sys.stdout)


def _say(word: str, colour: str, text: str, stream: TextIO) -> None:
    if shows_colour(stream):
        word = f"{colour}{word}{PLAIN}"
    print(word, text, file=stream)


def attached(command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a program on our terminal and return its exit code; Ctrl-C is the program's, not ours."""
    with interrupts_ignored():
        return subprocess.run(command, cwd=directory, env=environment, check=False).returncode


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Leave Ctrl-C to the program that has the terminal."""
    # Not SIG_IGN, which the program would inherit.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
