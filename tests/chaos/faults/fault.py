"""The decorator that makes a function a fault."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of the lease: safely longer.
LONGER = 1.5


@dataclass(frozen=True)
class Fault:
    """An operation that strikes once and asserts that it did, and the run that it needs."""

    name: str
    # Takes a testbed.
    strike: Callable[[Any], None]
    # How often it strikes in the short form, and in the full one.
    times: tuple[int, int]
    # What is sent while it strikes: tasks, chords, or nothing.
    load: str = "tasks"
    # How long each task takes.
    seconds: float = 0.01
    # Connections to Redis go through a proxy.
    proxied: bool = False
    # There is nothing to compare in kombu's transport.
    stalk_only: bool = False

    @property
    def about(self) -> str:
        """What it does, in a line."""
        return str(self.strike.__doc__).partition("\n")[0].rstrip(".")


def fault(short: int = 1, full: int = 1, **options: Any) -> Callable[[Callable[[Any], None]], Fault]:
    """Make a function a fault of its name, which strikes `short` or `full` times in a run."""

    def build(strike: Callable[[Any], None]) -> Fault:
        return Fault(strike.__name__, strike, (short, full), **options)

    return build
