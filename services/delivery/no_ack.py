"""Deliveries under no lease: broadcasts, which every node gets, and messages from a queue without acknowledgements.

Redis has nothing of them any more: the process that has received one runs it, now or at its ETA, and loses it if it
dies.
"""

from collections.abc import Iterable
from typing import Any

from celery.utils.log import get_logger

from services.delivery.claim import Tag
from services.delivery.unacked import UnackedDeliveries

logger = get_logger(__name__)


class NoAckDeliveries:
    """Takes the place of UnackedDeliveries (unacked.py) for one such message; asks nothing of Redis."""

    _in_pool = False

    def hand_to_pool(self, tag: str) -> bool:
        self._in_pool = True
        return True

    def start(self, tag: str, *, here: bool = False) -> bool:
        return True

    def is_in_pool(self, tag: str) -> bool:
        return self._in_pool

    def has_started(self, tag: str) -> bool:
        return False

    def keeps_as_dead_letter(self, kind: str) -> bool:
        return False

    def ack(self, tag: str) -> None:
        """Do nothing: Redis has nothing of it."""

    def requeue(self, tags: Iterable[str]) -> None:
        """Do nothing: its process ends, and the message with it."""

    def requeue_later(self, tag: str, task_id: str) -> None:
        logger.warning("%s is not run again, although its task asks for it: it was a broadcast", task_id)

    def record_crash(self, tag: str, detail: str) -> None:
        logger.error("%s is not run again, because it was a broadcast: %s", tag, detail)

    def reject(self, tag: str, reason: str, detail: str, *, reported: bool = False) -> None:
        if not reported:
            logger.error("%s is dropped, and no dead letter, because it was a broadcast: %s: %s", tag, reason, detail)


def deliveries_of(message: Any) -> UnackedDeliveries | NoAckDeliveries:
    """Where the delivery of a message is: among those of this process, or under no lease."""
    return message.channel.deliveries if isinstance(message.delivery_tag, Tag) else NoAckDeliveries()
