"""Acknowledgements wait a moment, so that many are sent together. After a crash what waits is run again."""

from collections.abc import Iterable

# What a crash can cost at most: long enough for a batch under load, too short for anybody to notice.
LONGEST_SECONDS = 0.01
MOST = 64


class AckBuffer:
    """Acknowledged tags that Redis has not been told of. Not thread-safe: UnackedDeliveries locks."""

    def __init__(self) -> None:
        # In order of arrival: tag → when it came, by `clock` of unacked.py.
        self._waiting: dict[str, float] = {}
        self._under_way: dict[str, float] = {}
        # Of both, those that were sent together with the mark of a start.
        self._mentioned: set[str] = set()

    def add(self, tag: str, now: float) -> None:
        self._waiting[tag] = now

    def take(self) -> list[str]:
        """What is sent with the next command, oldest first. `confirm` or `put_back` follows."""
        tags = list(self._waiting)[:MOST]
        for tag in tags:
            self._under_way[tag] = self._waiting.pop(tag)
        return tags

    def confirm(self, tags: Iterable[str]) -> None:
        """Forget them: Redis has them."""
        for tag in tags:
            self._under_way.pop(tag, None)

    def put_back(self, tags: Iterable[str]) -> None:
        """Keep them: Redis may not have them."""
        again = {tag: self._under_way.pop(tag) for tag in tags if tag in self._under_way}
        self._waiting = again | self._waiting

    def list_unmentioned(self) -> list[str]:
        """What is sent with the mark of a start, each tag once; no reply comes, so that `take` sends it again."""
        known = {*self._under_way, *self._waiting}
        new = [tag for tag in known if tag not in self._mentioned]
        self._mentioned = known
        return new

    @property
    def due(self) -> float | None:
        """When the oldest has to be sent; None when none waits."""
        for since in self._waiting.values():
            return since + LONGEST_SECONDS
        return None

    @property
    def full(self) -> bool:
        return len(self._waiting) + len(self._under_way) >= MOST

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._under_way
