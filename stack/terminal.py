"""The terminal: errors in red, and programs that have the terminal to themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from config.environment import shows_colour


def print_error(text: str) -> None:
    """Print on standard error what is wrong."""
    click.echo(f"{click.style('error:', fg='red')} {text}", err=True, color=shows_colour(sys.stderr))


def print_warning(text: str, to_errors: bool = False) -> None:
    """Print what is not as it should be and stops nothing, on standard output or on that of errors."""
    colour = shows_colour(sys.stderr if to_errors else sys.stdout)
    click.echo(f"{click.style('warning:', fg='yellow')} {text}", err=to_errors, color=colour)


def run_attached(command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a program on the terminal and return its exit code; Ctrl-C is the program's, not ours."""
    with catch_interrupts():
        return subprocess.run(command, cwd=directory, env=environment, check=False).returncode


@contextmanager
def catch_interrupts() -> Iterator[list[bool]]:
    """Let Ctrl-C end nothing in this process; the list gets an entry for each. It still ends the program that runs."""
    # Not SIG_IGN, which the program would inherit.
    caught: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
