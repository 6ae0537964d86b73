"""Errors in red on the terminal, and programs: run for what they print, or attached to the terminal."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from config.environment import shows_colour
from stack.errors import CommandError
from stack.paths import ROOT


def print_error(text: str) -> None:
    """Print on standard error what is wrong."""
    click.echo(f"{click.style('error:', fg='red')} {text}", err=True, color=shows_colour(sys.stderr))


def print_warning(text: str, to_errors: bool = False) -> None:
    """Print what is not as it should be and stops nothing, on standard output or on that of errors."""
    colour = shows_colour(sys.stderr if to_errors else sys.stdout)
    click.echo(f"{click.style('warning:', fg='yellow')} {text}", err=to_errors, color=colour)


def run(
    *command: str, check: bool = True, timeout: float | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and return what it printed.

    Raises CommandError, with the command's last line, when it is missing, takes too long, or fails (with `check`).
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not on PATH: install it") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"'{' '.join(command[:3])}' did not answer within {timeout:g} s") from None
    return require_success(done) if check else done


def require_success(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """What a command printed that succeeded; CommandError, with its last line, where it failed."""
    if done.returncode != 0:
        raise CommandError(f"'{' '.join(done.args)}' failed: {find_last_line(done.stderr or done.stdout)}")
    return done


def find_last_line(text: str) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


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
