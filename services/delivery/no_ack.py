"""What is under no lease: a broadcast, which every node gets, and what comes from a queue without acknowledgements.

Nobody keeps such a message: it is run by who has received it, now or at its ETA, and is gone with that process.
"""

from __future__ import annotations

from collections.abc import Iterable

from celery.utils.log import get_logger

logger = get_logger(__name__)


class Unleased:
    """Stands where the holder stands for what is leased (holder.py): nothing is asked of Redis."""

    _handed = False

    def hand_over(self, tag: str) -> bool:
        self._handed = True
        return True

    def start(self, tag: str, *, here: bool = False) -> bool:
        return True

    def handed(self, tag: str) -> bool:
        return self._handed

    def started(self, tag: str) -> bool:
        return False

    def keeps(self, kind: str) -> bool:
        return False

    def ack(self, tag: str) -> None:
        """Nothing: Redis has nothing of it."""

    def give_back(self, tags: Iterable[str]) -> None:
        """Nothing: its process ends, and the message with it."""

    def requeue(self, tag: str, task_id: str) -> None:
        logger.warning("%s is not run again, although its task asks for it: it was a broadcast", task_id)

    def crash(self, tag: str, detail: str) -> None:
        logger.error("%s is not run again, because it was a broadcast: %s", tag, detail)

    def reject(self, tag: str, reason: str, detail: str, *, told: bool = False) -> None:
        if not told:
            logger.error("%s is dropped, and no dead letter, because it was a broadcast: %s: %s", tag, reason, detail)
