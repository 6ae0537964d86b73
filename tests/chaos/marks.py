"""The marks that tasks leave outside Redis, and what they tell: executed, lost, started twice and why."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

# A node holds 16 tasks at most here, and has claimed anew twice when so many more have ended: a claim brings along all
# acknowledgements that wait.
ACKED_AFTER = 32
# The most that may have ended and not been acknowledged when a node dies.
ACK_BUFFER = 64

# Tasks that the largest pool runs at a time: as many may have been between the look at their lease and their start
# when their process was stopped.
SLOTS = 4

# Why a task may start a second time.
DIED = "its holder was killed"
FROZEN = "its holder was frozen for a lease"
CUT_OFF = "its holder was cut off for a lease"
STALLED = "its holder got no processor for two thirds of a lease"
FORGOT = "Redis had lost what it was told last"
EXITED = "its holder exited by itself"
STOCK = "a stock worker had held it"
NO_CAUSE = "no cause"
# What the contract allows; a node that exits by itself is no excuse.
ALLOWED = {DIED, FROZEN, CUT_OFF, STALLED, FORGOT, STOCK}
# Who holds a task says in Redis that it has started it, and Redis keeps that.
COUNTED = {DIED, FROZEN, CUT_OFF}
# Names of nodes that run kombu's own transport end so.
STOCK_HOST = "@stock"


@dataclass(frozen=True)
class Mark:
    """A line: `sent`, `refused`, `start`, `end`, `dies`, or `stalled`, which is of no task."""

    word: str
    task: str
    pid: int
    node: str
    # Of one clock for all processes of a machine.
    at: float
    wall: float
    # Of a start the number of the delivery; of what was sent the seconds that it is meant to take; of a stall those
    # that it lasted.
    number: float


class History:
    """When which node started and ended tasks: its own order of events, which no slow machine changes."""

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self._moments: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._ends: dict[tuple[str, int], list[float]] = defaultdict(list)
        for mark in sorted(marks, key=lambda mark: mark.at):
            self._moments[mark.word, mark.node].append(mark.at)
            if mark.word == "end":
                self._ends[mark.task, mark.pid].append(mark.at)

    def end_of(self, start: Mark) -> float | None:
        """When what started so ended."""
        return next((at for at in self._ends[start.task, start.pid] if at >= start.at), None)

    def count(self, word: str, node: str, since: float, until: float) -> int:
        """How many such marks the node made between two moments."""
        moments = self._moments[word, node]
        return max(0, bisect_left(moments, until) - bisect_right(moments, since))


@dataclass(frozen=True)
class Seen:
    """What Redis had when something happened: the tasks in it, and those of whose start it knew."""

    held: frozenset[str]
    told: frozenset[str]


@dataclass(frozen=True)
class Incident:
    """What happened to a holder of tasks: one node, one process, or, without both, everybody."""

    kind: str
    at: float
    until: float
    node: str = ""
    pid: int = 0
    # None where nobody could look.
    seen: Seen | None = None

    def excuses(self, before: Mark, again: Mark, history: History) -> bool:
        """Whether a task that had started with `before` could start `again` because of it."""
        holder = (not self.node and not self.pid) or self.node == before.node or self.pid == before.pid
        holder = holder or self._held_up(again, history)
        in_between = before.at <= self.until and self.at <= again.at
        return holder and in_between and not self._acknowledged(before, history)

    def _held_up(self, again: Mark, history: History) -> bool:
        """Whether a process was stopped after its look at a lease: it starts that task first of all when it moves."""
        stopped = self.kind in (FROZEN, STALLED) and self.node == again.node
        return stopped and history.count("start", again.node, self.until, again.at) < SLOTS

    def _acknowledged(self, before: Mark, history: History) -> bool:
        """Whether Redis was told that the task had ended, or must have been, before it happened."""
        ended = history.end_of(before)
        if ended is None or ended >= self.at:
            return False
        gone = self.seen is not None and before.task not in self.seen.held
        return gone or history.count("end", before.node, ended, self.at) > ACKED_AFTER


class Marks:
    """All marks in a directory; read on where the last look ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {}
        self._marks: list[Mark] = []
        # Kept as marks come, because every look asks for them.
        self._tasks: dict[str, set[str]] = defaultdict(set)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._running: dict[tuple[str, int], Mark] = {}
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
            for line in whole.splitlines():
                self._add(parse(line))
        return self._marks

    def _add(self, mark: Mark) -> None:
        self._marks.append(mark)
        self._tasks[mark.word].add(mark.task)
        self._counts[mark.word, mark.node] += 1
        self._counts[mark.word, ""] += 1
        # A process's own marks are read in the order in which it wrote them.
        if mark.word == "start":
            self._running[mark.task, mark.pid] = mark
        elif mark.word in ("end", "dies"):
            self._running.pop((mark.task, mark.pid), None)

    def tasks(self, word: str) -> set[str]:
        """The tasks with such a mark."""
        self.all()
        return set(self._tasks[word])

    def count(self, word: str, node: str = "") -> int:
        """How many such marks there are, of one node or of all."""
        self.all()
        return self._counts[word, node]

    def running(self, node: str = "") -> list[Mark]:
        """Starts without an end, of one node or of all."""
        self.all()
        return [mark for mark in self._running.values() if node in ("", mark.node)]


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
        gap, first, second = self.start.at - self.before.at, self.before, self.start
        numbers = f"start {first.number:g}, then {second.number:g}"
        return f"{second.task}: {first.node}, {gap:.2f} s later {second.node} ({self.why}; {numbers})"


def second_starts(marks: Iterable[Mark], incidents: list[Incident], mixed: bool = True) -> list[Again]:
    """Every start that was not the task's first; `mixed`: that a stock worker had it says enough."""
    every = list(marks)
    history, causes = History(every), told_by_marks(every, incidents)
    starts: dict[str, list[Mark]] = defaultdict(list)
    for mark in sorted(every, key=lambda mark: mark.at):
        if mark.word == "start":
            starts[mark.task].append(mark)
    found = [
        explain(before, again, causes, history, mixed)
        for of_task in starts.values()
        for before, again in pairwise(of_task)
    ]
    found = [replace(each, why=STOCK) if mixed and sent_again_by_stock(each, found) else each for each in found]
    return sorted(found, key=lambda again: again.start.at)


def sent_again_by_stock(body: Again, found: list[Again]) -> bool:
    """Whether a chord's body came again because a part of it did that a stock worker had held.

    That one has sent the body in stock's own way, of which Stalk knows nothing when the part ends once more.
    """
    chord, _, part = body.start.task.rpartition("-")
    return (part, body.why) == ("body", NO_CAUSE) and any(
        each.before.node.endswith(STOCK_HOST) and each.start.at < body.start.at
        for each in found
        if each is not body and each.start.task.rpartition("-")[0] == chord
    )


def told_by_marks(marks: list[Mark], incidents: list[Incident]) -> list[Incident]:
    """All incidents, with those of which the processes themselves tell; who stood still by itself is asked last."""
    last: dict[int, float] = defaultdict(float)
    for mark in marks:
        last[mark.pid] = max(last[mark.pid], mark.at)
    stalls = [Incident(STALLED, mark.at - mark.number, mark.at, mark.node) for mark in marks if mark.word == "stalled"]
    # Between a process's deadly signal to itself and its end its other threads go on: until its last mark.
    deaths = [Incident(DIED, mark.at, last[mark.pid], pid=mark.pid) for mark in marks if mark.word == "dies"]
    return [*stalls, *incidents, *deaths]


def explain(before: Mark, again: Mark, incidents: list[Incident], history: History, mixed: bool) -> Again:
    """Find the incident that excuses a second start; the last one, because the one before may have been survived."""
    for incident in reversed(incidents):
        if incident.excuses(before, again, history):
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
    """What started again without a higher count, although Redis had been told that it had started before."""

    def was_told(each: Again) -> bool:
        # A stock worker neither tells nor is told: the count is no header.
        ours = not any(start.node.endswith(STOCK_HOST) for start in (each.before, each.start))
        if not (ours and each.why in COUNTED and each.incident and each.incident.seen):
            return False
        # What started after that look may have been in it for its start before, on another node.
        return each.before.at <= each.incident.at and each.before.task in each.incident.seen.told

    return [each for each in again if was_told(each) and not each.recorded]


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
