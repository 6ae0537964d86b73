"""Bounded waits: a test never sleeps for a fixed time, and a wait that fails shows the state of what was waited for."""

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

T = TypeVar("T")

# Short beside everything that is waited for, long beside the cost of a check.
LOOK_SECONDS = 0.05
# What is waited for takes milliseconds or seconds; on a busy machine it has taken up to forty times as long.
TIMEOUT_SECONDS = 120


class GaveUp(AssertionError):
    """What was waited for did not happen in time."""


def wait_until(
    condition: Callable[[], T | None],
    timeout: float,
    what: str,
    context: Callable[[], str] = lambda: "",
    look: float = LOOK_SECONDS,
) -> T:
    """Check until `condition()` is true and return its value.

    Raises GaveUp after `timeout` seconds, with `what` and the state that `context()` returns.
    """
    end = monotonic() + timeout
    while not (value := condition()):
        if monotonic() > end:
            raise GaveUp(f"waited {timeout:g} s in vain: {what} (last value: {value!r})\n{context()}")
        sleep(look)
    return value


def holds_for(
    condition: Callable[[], object], seconds: float, what: str, context: Callable[[], str] = lambda: ""
) -> None:
    """Check for `seconds` and fail as soon as `condition()` is false: for what must not happen."""
    end = monotonic() + seconds
    while monotonic() < end:
        if not condition():
            raise GaveUp(f"did not hold for {seconds:g} s: {what}\n{context()}")
        sleep(LOOK_SECONDS)
