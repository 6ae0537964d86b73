"""Acknowledgements wait a moment, so that many travel together. What waits is run again after a crash."""

from __future__ import annotations

from collections.abc import Iterable

# The bounds of what a crash can cost: long enough for a batch under load, too short for anyone to notice.
LONGEST_SECONDS = 0.01
MOST = 64


class AckBuffer:
    """Tags that are done and of which Redis does not know it yet. Not thread-safe: its deliveries locks."""

    def __init__(self) -> None:
        # In order of arrival: tag → when it came, by the deliveries's clock.
        self._waiting: dict[str, float] = {}
        self._under_way: dict[str, float] = {}
        # Of both, those that Redis has been told of in passing.
        self._mentioned: set[str] = set()

    def add(self, tag: str, now: float) -> None:
        self._waiting[tag] = now

    def take(self) -> list[str]:
        """What goes with the next command, oldest first. `sent` or `put_back` follows."""
        tags = list(self._waiting)[:MOST]
        for tag in tags:
            self._under_way[tag] = self._waiting.pop(tag)
        return tags

    def sent(self, tags: Iterable[str]) -> None:
        """Redis knows them."""
        for tag in tags:
            self._under_way.pop(tag, None)

    def put_back(self, tags: Iterable[str]) -> None:
        """Redis may not know them."""
        again = {tag: self._under_way.pop(tag) for tag in tags if tag in self._under_way}
        self._waiting = again | self._waiting

    def mention(self) -> list[str]:
        """What Redis can be told of in passing, each tag once; it is told again, because nobody hears an answer."""
        known = {*self._under_way, *self._waiting}
        new = [tag for tag in known if tag not in self._mentioned]
        self._mentioned = known
        return new

    @property
    def due(self) -> float | None:
        """When the oldest has to go; None when none waits."""
        for since in self._waiting.values():
            return since + LONGEST_SECONDS
        return None

    @property
    def full(self) -> bool:
        return len(self._waiting) + len(self._under_way) >= MOST

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._under_way
