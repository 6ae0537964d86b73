"""When tasks started: a file of slots for each thread that runs them, shared with who counts.

A log line a task would cost more than what is measured; a slot costs less than a microsecond.
"""

from __future__ import annotations

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
    """The slots of one thread of one process: nobody has to wait for another one."""

    def __init__(self, directory: Path, room: int) -> None:
        with (directory / f"{os.getpid()}-{get_ident()}").open("w+b") as file:
            file.truncate(SLOT.size * (room + 1))
            self._slots = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")

    def note(self) -> None:
        """Write down that a task starts now; raises IndexError when there is no room."""
        number = int(self._slots[0]) + 1
        self._slots[number] = monotonic()
        # Last, because who counts may look at any moment.
        self._slots[0] = number


@cache
def recorder(pid: int, thread: int) -> Recorder:
    """The recorder of the process and thread that ask: a child of a pool must not write into what it inherited."""
    return Recorder(Path(os.environ["COST_STARTS"]), int(os.environ["COST_ROOM"]))


def count(directory: Path) -> int:
    """Tasks that have started."""
    total = 0
    for path in directory.iterdir():
        with path.open("rb") as file:
            # Empty for a moment after it is made.
            start = file.read(SLOT.size)
        total += int(SLOT.unpack(start)[0]) if start else 0
    return total


def times(directory: Path) -> list[float]:
    """Seconds of the monotonic clock, which is one for all processes of a machine, in their order."""
    found: list[float] = []
    for path in directory.iterdir():
        if content := path.read_bytes():
            slots = memoryview(content).cast("d")
            found += slots[1 : int(slots[0]) + 1].tolist()
    return sorted(found)
