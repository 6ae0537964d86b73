"""Memory of a process tree, from /proc/<pid>/smaps_rollup, and the table of a run about it."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
KIB = 2**10
# The proportional share (PSS), because the children of a prefork node share pages with it and with each other: the
# shares of all processes add up to the memory of the tree, while the sum of their RSS counts a shared page once for
# each process. Pages of files are left out: all Python processes of the machine share them, so the share changes when
# one of those ends, and the kernel may drop them at any time. Swapped pages are included, or they would look freed.
OWN = ("Pss_Anon", "Pss_Shmem", "SwapPss")
FILES = "Pss_File"
# The memory of a process if it shared nothing. A page is no longer shared once a child writes to it, be it only by
# garbage collection: then the tree takes more memory although no process has allocated any. So a leak shows in these
# fields, and its cost in the shares above.
ALONE = ("Anonymous", "Swap")


def parse(text: str) -> dict[str, int]:
    """The fields of /proc/<pid>/smaps_rollup, in bytes."""
    return {name: int(kib) * KIB for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


@dataclass(frozen=True)
class Footprint:
    """Memory of one process in bytes: its share, the same if nothing were shared, its share of the pages of files."""

    own: int
    alone: int
    files: int


def footprint(text: str) -> Footprint:
    """The memory of a process from its smaps_rollup. Raises KeyError where the kernel is older than 5.4."""
    fields = parse(text)
    own, alone = (sum(fields[name] for name in names) for names in (OWN, ALONE))
    return Footprint(own, alone, fields[FILES])


@dataclass(frozen=True)
class Reading:
    """Memory of a process tree by pid; the process that started the others comes first."""

    processes: dict[int, Footprint]

    @property
    def own(self) -> int:
        """Bytes of the whole tree."""
        return sum(each.own for each in self.processes.values())

    @property
    def alone(self) -> int:
        """Bytes of the whole tree if its processes shared nothing."""
        return sum(each.alone for each in self.processes.values())

    @property
    def files(self) -> int:
        """Bytes of the tree's share of pages of files."""
        return sum(each.files for each in self.processes.values())


def read(pids: Iterable[int]) -> Reading:
    """The memory of these processes, without those that have ended meanwhile."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = footprint(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Reading(found)


@dataclass(frozen=True)
class Figure:
    """A line of the table: what was measured, and the bound for it, if any."""

    name: str
    seen: str
    bound: str = ""
    kept: bool = True


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:.2f} MiB"


def signed(size: float) -> str:
    """Growth in bytes, as MiB."""
    return f"{size / MIB:+.2f} MiB"


def growth(name: str, before: int, after: int, limit: int) -> Figure:
    """A growth in bytes that must be less than `limit`."""
    return Figure(name, signed(after - before), f"< {limit // MIB} MiB", after - before < limit)


def change(name: str, before: int, after: int, limit: int) -> Figure:
    """A difference in bytes, up or down, that must be less than `limit`."""
    return Figure(name, signed(after - before), f"± {limit // MIB} MiB", abs(after - before) < limit)


def exactly(name: str, seen: int, wanted: int) -> Figure:
    """A count that must be equal to `wanted`."""
    return Figure(name, f"{seen:,}", f"= {wanted:,}", seen == wanted)


def of_each(before: Reading, after: Reading) -> list[Figure]:
    """The memory of each process before and after, or that it started or ended in between."""
    return [_of_one(number, pid, before, after) for number, pid in enumerate({**before.processes, **after.processes})]


def _of_one(number: int, pid: int, before: Reading, after: Reading) -> Figure:
    name = f"of these process {number}, a child" if number else "of these the first process"
    first, last = before.processes.get(pid), after.processes.get(pid)
    if first and last:
        seen = f"{mib(first.own)} → {mib(last.own)} ({signed(last.own - first.own)})"
        return Figure(name, f"{seen}; if it shared nothing, {signed(last.alone - first.alone)}")
    return Figure(name, f"{mib(first.own)}, then it ended" if first else f"came later, {mib(last.own if last else 0)}")


def breaches(figures: Sequence[Figure]) -> list[str]:
    """A sentence for each bound that is broken."""
    return [f"{each.name}: {each.seen}, and the bound is {each.bound}" for each in figures if not each.kept]


def table(figures: Sequence[Figure]) -> str:
    """The figures as Markdown."""
    rows = [f"| {each.name} | {each.seen} | {_verdict(each)} |" for each in figures]
    return "\n".join(["| figure | seen | bound |", "|---|---|---|", *rows])


def _verdict(figure: Figure) -> str:
    if not figure.bound:
        return ""
    return f"{figure.bound}: {'kept' if figure.kept else '**broken**'}"
