"""Arithmetic: the shortest task there is, and the one to send first."""

from datetime import UTC, datetime

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)


@shared_task
def add(x: float, y: float) -> float:
    """Return x + y, and log the time (UTC, ISO 8601) and the sum.

    Idempotent. Raises TypeError if x and y cannot be added.
    """
    total = x + y
    logger.info("%s sum=%s", datetime.now(UTC).isoformat(), total)
    return total
