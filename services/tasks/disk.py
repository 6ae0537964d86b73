"""Disk space: looked at from time to time, so that somebody hears of it before the disk is full."""

import shutil
from collections.abc import Sequence
from typing import TypedDict

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

# The last tenth goes fast: from here on, file systems fragment and databases that rewrite their files (they
# need the space twice for a while) begin to fail. It still leaves time to act.
WARN_BELOW = 0.10


class Space(TypedDict):
    """The space of a file system in bytes; `free` is what an ordinary user may still write."""

    free: int
    total: int


@shared_task
def report_free_space(paths: Sequence[str] = ("/tmp",), warn_below: float = WARN_BELOW) -> dict[str, Space]:
    """Return the space of the file system that each path is on, and log a warning where little is left.

    `warn_below` is a share of the whole, 0.10 for a tenth. The paths are those of the worker, within its
    container.

    It only reads, so running twice does no harm but for a second warning. Raises OSError if a path cannot be
    looked at: a watch over the wrong path should be noticed.
    """
    return {path: _look_at(path, warn_below) for path in paths}


def _look_at(path: str, warn_below: float) -> Space:
    """Return the space at one path, having warned if it is short."""
    total, _, free = shutil.disk_usage(path)
    if is_short(free, total, warn_below):
        logger.warning("%s has %d of %d bytes left, below %.0f%%", path, free, total, 100 * warn_below)
    return Space(free=free, total=total)


def is_short(free: int, total: int, share: float) -> bool:
    """Return whether less than this share of the total is free; a file system of no size is never short."""
    return free < share * total
