"""What the kernel says about the CPU time of processes."""

import os
from collections.abc import Iterable

from services.supervisor.proc_stat import read_stat

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Seconds of CPU that these processes and their ended children have used; those that are gone count nothing."""
    return sum(stat.cpu + stat.children_cpu for pid in pids if (stat := read_stat(pid))) / TICKS
