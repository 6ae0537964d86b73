"""Outages: the log lines of a loop that waits for Redis: one when it begins, one a minute, and one when it is over."""

from collections.abc import Callable
from time import monotonic

from services.broker.client import format_error

# Within a minute a log shows that an outage goes on; an outage of a night fills a page.
MINUTE = 60.0


class Outage:
    """The log lines of one loop of this process; `log` writes a line.

    For a Redis that comes and goes there are two lines a minute at most.
    """

    def __init__(self, loop: str, log: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._loop, self._log, self._clock = loop, log, clock
        # Of an outage that goes on: since when, which Redis it is, and whether it is in the log.
        self._since: float | None = None
        self._where, self._is_logged = "", False
        self._last_line_at = float("-inf")

    def record_failure(self, error: Exception, where: str, purpose: str = "") -> bool:
        """Note that Redis at `where` has failed; `purpose` is what it should do. Returns whether that was logged."""
        now = self._clock()
        since = self._since
        if since is None:
            since, self._since, self._where = now, now, where
        if now - self._last_line_at < MINUTE:
            return False
        # First, so that no other thread logs it too.
        self._last_line_at = now
        how = f"still waiting, after {now - since:.0f} s," if self._is_logged else "waiting"
        self._is_logged = True
        self._log(f"{self._loop}: {how} for {where}{purpose and ' to '}{purpose}: {format_error(error)}")
        return True

    def record_recovery(self) -> bool:
        """Note that Redis works. Returns whether there was an outage, however short."""
        since, self._since = self._since, None
        was_logged, self._is_logged = self._is_logged, False
        if since is not None and was_logged:
            self._log(f"{self._loop}: goes on after {self._clock() - since:.1f} s of waiting for {self._where}")
        return since is not None
