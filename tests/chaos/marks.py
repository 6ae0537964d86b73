"""The marks that tasks leave outside Redis, and what they tell: executed, lost, started twice and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# An end is acknowledged within 10 ms; on a busy machine the thread that does it may wait for its turn.
ACK_SECONDS = 1.0
# The most that may have ended and not been acknowledged when a node dies.
ACK_BUFFER = 64

# Within which Redis has been told that a task has started; on an idle machine it takes milliseconds.
TOLD_SECONDS = 0.2
# Processes that move again do so within milliseconds, on a busy machine a little later.
THAW_SECONDS = 1.0

# Between a process's deadly signal to itself and its end, in which its other threads go on.
DYING_SECONDS = 0.5

# Why a task may start a second time.
DIED = "its holder was killed"
FROZEN = "its holder was frozen for a lease"
CUT_OFF = "its holder was cut off for a lease"
FORGOT = "Redis had lost what it was told last"
EXITED = "its holder exited by itself"
STOCK = "a stock worker had held it"
NO_CAUSE = "no cause"
# What the contract allows; a node that exits by itself is no excuse.
ALLOWED = {DIED, FROZEN, CUT_OFF, FORGOT, STOCK}
# Who holds a task says in Redis that it has started it, and Redis keeps that.
COUNTED = {DIED, FROZEN, CUT_OFF}
# Names of nodes that run kombu's own transport end so.
STOCK_HOST = "@stock"


@dataclass(frozen=True)
class Mark:
    """A line: `sent`, `refused`, `start`, `end` or `dies`."""

    word: str
    task: str
    pid: int
    node: str
    # Of one clock for all processes of a machine.
    at: float
    wall: float
    # Of a start the number of the delivery; of what was sent the seconds that it is meant to take.
    number: float


@dataclass(frozen=True)
class Incident:
    """What happened to a holder of tasks: one node, one process, or, without both, everybody."""

    kind: str
    at: float
    until: float
    node: str = ""
    pid: int = 0

    def excuses(self, before: Mark, ended: float | None, again: Mark) -> bool:
        """Whether a task that had started with `before` (and `ended`) could start `again` because of it."""
        holder = (not self.node and not self.pid) or self.node == before.node or self.pid == before.pid
        # A process may have been frozen after its last look at a lease: it starts that task first of all when it moves.
        holder = holder or (self.kind == FROZEN and self.node == again.node and again.at < self.until + THAW_SECONDS)
        in_between = before.at <= self.until and self.at <= again.at
        acknowledged = ended is not None and ended + ACK_SECONDS < self.at
        return holder and in_between and not acknowledged


class Marks:
    """All marks in a directory; read on where the last look ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {}
        self._marks: list[Mark] = []
        directory.mkdir(parents=True, exist_ok=True)
        # Containers write here as another user.
        directory.chmod(0o777)

    def all(self) -> list[Mark]:
        """Every mark so far, in no order."""
        for path in self.directory.iterdir():
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            # Each line is one write, but a look may come in the middle of it where a page of the file ends.
            whole = text[: text.rfind("\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            self._marks += [parse(line) for line in whole.splitlines()]
        return self._marks

    def tasks(self, word: str) -> set[str]:
        """The tasks with such a mark."""
        return {mark.task for mark in self.all() if mark.word == word}

    def count(self, word: str, node: str = "") -> int:
        """How many such marks there are, of one node or of all."""
        return sum(1 for mark in self.all() if mark.word == word and node in ("", mark.node))

    def running(self, node: str = "") -> list[Mark]:
        """Starts without an end, of one node or of all."""
        ended = {(mark.task, mark.pid) for mark in self.all() if mark.word in ("end", "dies")}
        starts = [mark for mark in self.all() if mark.word == "start" and node in ("", mark.node)]
        return [mark for mark in starts if (mark.task, mark.pid) not in ended]


def parse(line: str) -> Mark:
    word, task, pid, node, at, wall, number = line.split()
    return Mark(word, task, int(pid), node, float(at), float(wall), float(number))


@dataclass(frozen=True)
class Again:
    """A start that was not the task's first, and why it came about."""

    before: Mark
    start: Mark
    why: str
    incident: Incident | None = None

    @property
    def recorded(self) -> bool:
        """Whether the delivery says that it is not the first."""
        return self.start.number > self.before.number

    def __str__(self) -> str:
        gap = self.start.at - self.before.at
        return f"{self.start.task}: {self.before.node}, {gap:.2f} s later {self.start.node} ({self.why})"


def second_starts(marks: Iterable[Mark], incidents: list[Incident], mixed: bool = True) -> list[Again]:
    """Every start that was not the task's first; `mixed`: that a stock worker had it says enough."""
    starts: dict[str, list[Mark]] = defaultdict(list)
    ends: dict[tuple[str, int], list[float]] = defaultdict(list)
    deaths = list(incidents)
    for mark in marks:
        if mark.word == "start":
            starts[mark.task].append(mark)
        elif mark.word == "end":
            ends[mark.task, mark.pid].append(mark.at)
        elif mark.word == "dies":
            deaths.append(Incident(DIED, mark.at, mark.at + DYING_SECONDS, pid=mark.pid))
    found = []
    for of_task in starts.values():
        of_task.sort(key=lambda mark: mark.at)
        for before, again in pairwise(of_task):
            ended = min((at for at in ends[before.task, before.pid] if at >= before.at), default=None)
            found.append(explain(before, ended, again, deaths, mixed))
    return sorted(found, key=lambda again: again.start.at)


def explain(before: Mark, ended: float | None, again: Mark, incidents: list[Incident], mixed: bool) -> Again:
    """Find the incident that excuses a second start; the last one, because the one before may have been survived."""
    for incident in reversed(incidents):
        if incident.excuses(before, ended, again):
            return Again(before, again, incident.kind, incident)
    return Again(before, again, STOCK if mixed and before.node.endswith(STOCK_HOST) else NO_CAUSE)


def too_many(again: Iterable[Again], running: int) -> list[str]:
    """Incidents after which more started again than the holder had run (at most `running`) and not acknowledged."""
    counted = Counter((each.incident, each.before.node) for each in again if each.incident)
    return [
        f"{count} tasks of {node} started again because {incident.kind}"
        for (incident, node), count in counted.items()
        if incident and count > running + ACK_BUFFER
    ]


def unrecorded(again: Iterable[Again]) -> list[Again]:
    """What started again without a higher count, although Redis could have been told that it had started before.

    It is told when the node's own process hears of a start, which is a moment later, and by a frozen one not at all.
    """

    def could_be_told(each: Again) -> bool:
        # A stock worker neither tells nor is told: the count is no header.
        ours = not any(start.node.endswith(STOCK_HOST) for start in (each.before, each.start))
        told = each.incident is not None and each.incident.at - each.before.at > TOLD_SECONDS
        return ours and each.why in COUNTED and told

    return [each for each in again if could_be_told(each) and not each.recorded]


def worst_delay(marks: Iterable[Mark]) -> float:
    """The longest that a task took from its publish to its first end, beyond the time that it was meant to take."""
    due: dict[str, float] = {}
    ended: dict[str, float] = {}
    for mark in marks:
        if mark.word == "sent":
            due[mark.task] = mark.at + mark.number
        elif mark.word == "end":
            ended[mark.task] = min(mark.at, ended.get(mark.task, mark.at))
    return max((ended[task] - at for task, at in due.items() if task in ended), default=0.0)
