"""What the kernel says about the CPU time of processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def stat_ticks(text: str) -> int:
    """Ticks of CPU in a /proc/<pid>/stat: its own, and those of its children that have ended."""
    # The name before the state may hold spaces and brackets.
    fields = text.rpartition(")")[2].split()
    # utime, stime, cutime and cstime are fields 14 to 17 of the line, and the state is the third.
    return sum(map(int, fields[11:15]))


def cpu_seconds(pids: Iterable[int]) -> float:
    """Seconds of CPU that these processes have used so far; those that have ended count nothing."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            ticks += stat_ticks(Path(f"/proc/{pid}/stat").read_text())
    return ticks / TICKS
