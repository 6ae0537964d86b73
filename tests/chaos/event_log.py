"""The event log: what tasks record of their starts and ends, outside Redis, and what happened to nodes."""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# A node holds 16 tasks at most here. When so many more have ended it has claimed twice since, and each claim sends all
# acknowledgements that were waiting.
ACKED_AFTER = 32
# The most that may have ended and not been acknowledged when a node dies.
ACK_BUFFER = 64
# Tasks that the largest pool runs at a time: as many may have been between the check of their lease and their start
# when their process was stopped.
SLOTS = 4

# Why a task may start a second time. Its holder is the node or process that had claimed it.
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
# In these cases Redis knows that the task has started before, so its delivery count must have grown.
COUNTED = {DIED, FROZEN, CUT_OFF}
# The host part of the names of nodes that run kombu's own transport.
STOCK_HOST = "@stock"


@dataclass(frozen=True)
class Event:
    """A line of the log. `word` is sent, refused, start, end, dies, or stalled, which concerns no task."""

    word: str
    task: str
    pid: int
    node: str
    # Seconds of the monotonic clock, which all processes of a machine share.
    at: float
    # Of a start the delivery count; of `sent` the seconds that the task is meant to take; of a stall its seconds.
    number: float


class History:
    """When each node started and ended tasks, in the order of that node, which a slow machine does not change."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._moments: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._ends: dict[tuple[str, int], list[float]] = defaultdict(list)
        for event in sorted(events, key=lambda event: event.at):
            self._moments[event.word, event.node].append(event.at)
            if event.word == "end":
                self._ends[event.task, event.pid].append(event.at)

    def end_of(self, start: Event) -> float | None:
        """When the task that started with this event ended; None if it did not."""
        return next((at for at in self._ends[start.task, start.pid] if at >= start.at), None)

    def count(self, word: str, node: str, since: float, until: float) -> int:
        """How many such events the node recorded between two moments."""
        moments = self._moments[word, node]
        return max(0, bisect_left(moments, until) - bisect_right(moments, since))


@dataclass(frozen=True)
class Snapshot:
    """What Redis had at one moment: the tasks in it, and those of them that it knew to have started."""

    stored: frozenset[str]
    started: frozenset[str]


@dataclass(frozen=True)
class Incident:
    """What happened to a node or a process that held tasks, or, without both, to all."""

    kind: str
    at: float
    until: float
    node: str = ""
    pid: int = 0
    # None where there was no moment to take one.
    snapshot: Snapshot | None = None

    def excuses(self, before: Event, again: Event, history: History) -> bool:
        """Whether a task that had started with `before` could start `again` because of it."""
        holder = (not self.node and not self.pid) or self.node == before.node or self.pid == before.pid
        holder = holder or self._held_up(again, history)
        in_between = before.at <= self.until and self.at <= again.at
        return holder and in_between and not self._acknowledged(before, history)

    def _held_up(self, again: Event, history: History) -> bool:
        """Whether a process was stopped between checking a lease and starting that task, which it then starts first."""
        stopped = self.kind in (FROZEN, STALLED) and self.node == again.node
        return stopped and history.count("start", again.node, self.until, again.at) < SLOTS

    def _acknowledged(self, before: Event, history: History) -> bool:
        """Whether the task was, or must have been, acknowledged before the incident."""
        ended = history.end_of(before)
        if ended is None or ended >= self.at:
            return False
        gone = self.snapshot is not None and before.task not in self.snapshot.stored
        return gone or history.count("end", before.node, ended, self.at) > ACKED_AFTER


class EventLog:
    """The event log in a directory, of one file for each process; each read goes on where the last one ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {}
        self._events: list[Event] = []
        # Updated with each event, because waits ask for them twenty times a second.
        self._tasks: dict[str, set[str]] = defaultdict(set)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._running: dict[tuple[str, int], Event] = {}
        directory.mkdir(parents=True, exist_ok=True)
        # Containers write here as another user.
        directory.chmod(0o777)

    def all(self) -> list[Event]:
        """Every event so far, unordered."""
        for path in self.directory.iterdir():
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            # Each line is one write, but a read may come in the middle of it where a page of the file ends.
            whole = text[: text.rfind("\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._add(parse(line))
        return self._events

    def _add(self, event: Event) -> None:
        self._events.append(event)
        self._tasks[event.word].add(event.task)
        self._counts[event.word, event.node] += 1
        self._counts[event.word, ""] += 1
        # Events of one process are read in the order in which it wrote them.
        if event.word == "start":
            self._running[event.task, event.pid] = event
        elif event.word in ("end", "dies"):
            self._running.pop((event.task, event.pid), None)

    def tasks(self, word: str) -> set[str]:
        """The tasks with such an event."""
        self.all()
        return set(self._tasks[word])

    def tasks_of(self, word: str, label: str) -> set[str]:
        """The tasks of a workload with such an event."""
        return {task for task in self.tasks(word) if is_of(task, label)}

    def count(self, word: str, node: str = "") -> int:
        """How many such events there are, of one node or of all."""
        self.all()
        return self._counts[word, node]

    def running(self, node: str = "") -> list[Event]:
        """Starts without an end, of one node or of all."""
        self.all()
        return [event for event in self._running.values() if node in ("", event.node)]


def is_of(task: str, label: str) -> bool:
    """Whether a task's id belongs to the workload with this label."""
    return task.startswith(f"chaos-{label}-")


def parse(line: str) -> Event:
    word, task, pid, node, at, number = line.split()
    return Event(word, task, int(pid), node, float(at), float(number))
