"""When tasks started: a file of slots for each thread that runs them, memory-mapped.

A log line a task would cost more than what is measured; a slot costs less than a microsecond.
"""

import mmap
import os
import struct
from functools import cache
from pathlib import Path
from threading import get_ident
from time import monotonic

# The first slot says how many of the others are filled.
SLOT = struct.Struct("d")


class Recorder:
    """The slots of one thread of one process, written without a lock."""

    def __init__(self, directory: Path, room: int) -> None:
        with (directory / f"{os.getpid()}-{get_ident()}").open("w+b") as file:
            file.truncate(SLOT.size * (room + 1))
            self._slots = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")

    def record(self) -> None:
        """Record that a task starts now. Raises IndexError when all slots are filled."""
        number = int(self._slots[0]) + 1
        self._slots[number] = monotonic()
        # Last, because count() may read at any moment.
        self._slots[0] = number


@cache
def recorder(pid: int, thread: int) -> Recorder:
    """The recorder of this process and thread: a pool child must not write to the one that it inherited."""
    return Recorder(Path(os.environ["COST_STARTS"]), int(os.environ["COST_ROOM"]))


def count(directory: Path) -> int:
    """Tasks that have started."""
    total = 0
    for path in directory.iterdir():
        with path.open("rb") as file:
            # Empty for a moment after its creation.
            start = file.read(SLOT.size)
        total += int(SLOT.unpack(start)[0]) if start else 0
    return total


def times(directory: Path) -> list[float]:
    """Sorted seconds of the monotonic clock, which all processes of a machine share."""
    found: list[float] = []
    for path in directory.iterdir():
        if content := path.read_bytes():
            slots = memoryview(content).cast("d")
            found += slots[1 : int(slots[0]) + 1].tolist()
    return sorted(found)
