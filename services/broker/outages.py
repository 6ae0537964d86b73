"""Outages: what a loop says while it waits for Redis. One line when it begins, one a minute, one when it is over."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from services.broker.client import format_error

# Whoever looks into a log sees within a minute that it goes on, and an outage of a night leaves a page.
MINUTE = 60.0


class Outage:
    """What one loop of this process says; `say` writes a line.

    A Redis that comes and goes is said to be away once a minute at most, and to be back as often.
    """

    def __init__(self, loop: str, say: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._loop, self._say, self._clock = loop, say, clock
        # Of the outage that goes on: since when, whether that has been said, and for whom it waits.
        self._since: float | None = None
        self._said, self._where = False, ""
        self._last_said = float("-inf")

    def record_failure(self, error: Exception, where: str, purpose: str = "") -> bool:
        """Wait for `where` once more, because of this error; `purpose` says to do what. Whether there was a line."""
        now = self._clock()
        since = self._since
        if since is None:
            since, self._since, self._where = now, now, where
        if now - self._last_said < MINUTE:
            return False
        # First, so that no other thread says it too.
        self._last_said = now
        how = f"still waiting, after {now - since:.0f} s," if self._said else "waiting"
        self._said = True
        self._say(f"{self._loop}: {how} for {where}{purpose and ' to '}{purpose}: {format_error(error)}")
        return True

    def record_recovery(self) -> bool:
        """Go on. Whether there was an outage, however short."""
        since, self._since = self._since, None
        said, self._said = self._said, False
        if since is not None and said:
            self._say(f"{self._loop}: goes on after {self._clock() - since:.1f} s of waiting for {self._where}")
        return since is not None
