"""Second starts of tasks, and whether an incident explains each."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from tests.chaos.event_log import (
    ACK_BUFFER,
    COUNTED,
    DIED,
    NO_CAUSE,
    STALLED,
    STOCK,
    STOCK_HOST,
    Event,
    History,
    Incident,
)


@dataclass(frozen=True)
class SecondStart:
    """A start that was not the task's first, and its cause."""

    before: Event
    start: Event
    why: str
    incident: Incident | None = None

    @property
    def recorded(self) -> bool:
        """Whether the delivery count has grown."""
        return self.start.number > self.before.number

    def __str__(self) -> str:
        gap, first, second = self.start.at - self.before.at, self.before, self.start
        numbers = f"start {first.number:g}, then {second.number:g}"
        return f"{second.task}: {first.node}, {gap:.2f} s later {second.node} ({self.why}; {numbers})"


def find_second_starts(events: Iterable[Event], incidents: list[Incident], mixed: bool = True) -> list[SecondStart]:
    """Every start that was not the task's first; with `mixed`, that a stock worker had held it is a cause."""
    every = list(events)
    history, causes = History(every), add_reported_incidents(every, incidents)
    starts: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(every, key=lambda event: event.at):
        if event.word == "start":
            starts[event.task].append(event)
    found = [
        explain(before, again, causes, history, mixed)
        for of_task in starts.values()
        for before, again in pairwise(of_task)
    ]
    found = [replace(each, why=STOCK) if mixed and is_resent_by_stock(each, found) else each for each in found]
    return sorted(found, key=lambda again: again.start.at)


def is_resent_by_stock(body: SecondStart, found: list[SecondStart]) -> bool:
    """Whether a chord's body came again because a part of the chord did that a stock worker had held.

    The stock worker sent the body without a record that Stalk knows, so the part's second end sends it again.
    """
    chord, _, part = body.start.task.rpartition("-")
    return (part, body.why) == ("body", NO_CAUSE) and any(
        each.before.node.endswith(STOCK_HOST) and each.start.at < body.start.at
        for each in found
        if each is not body and each.start.task.rpartition("-")[0] == chord
    )


def add_reported_incidents(events: list[Event], incidents: list[Incident]) -> list[Incident]:
    """All incidents, with those that the event log reports; stalls come first, as explain() tries the last first."""
    last: dict[int, float] = defaultdict(float)
    for event in events:
        last[event.pid] = max(last[event.pid], event.at)
    stalled = [event for event in events if event.word == "stalled"]
    stalls = [Incident(STALLED, event.at - event.number, event.at, event.node) for event in stalled]
    # After the signal that a process sends to itself its other threads go on for a moment: until its last event.
    deaths = [Incident(DIED, event.at, last[event.pid], pid=event.pid) for event in events if event.word == "dies"]
    return [*stalls, *incidents, *deaths]


def explain(before: Event, again: Event, incidents: list[Incident], history: History, mixed: bool) -> SecondStart:
    """Find the last incident that excuses a second start: the node may have survived an earlier one."""
    for incident in reversed(incidents):
        if incident.excuses(before, again, history):
            return SecondStart(before, again, incident.kind, incident)
    return SecondStart(before, again, STOCK if mixed and before.node.endswith(STOCK_HOST) else NO_CAUSE)


def find_excessive(again: Iterable[SecondStart], running: int) -> list[str]:
    """Incidents after which more tasks started again than the node can have run (`running`) and not acknowledged."""
    counted = Counter((each.incident, each.before.node) for each in again if each.incident)
    return [
        f"{count} tasks of {node} started again because {incident.kind}"
        for (incident, node), count in counted.items()
        if incident and count > running + ACK_BUFFER
    ]


def find_unrecorded(again: Iterable[SecondStart]) -> list[SecondStart]:
    """Second starts without a higher delivery count although Redis knew of the first start."""

    def was_known(each: SecondStart) -> bool:
        # Stock workers keep no delivery count.
        ours = not any(start.node.endswith(STOCK_HOST) for start in (each.before, each.start))
        if not (ours and each.why in COUNTED and each.incident and each.incident.snapshot):
            return False
        # A task that started after the snapshot may be in it because of an earlier start on another node.
        return each.before.at <= each.incident.at and each.before.task in each.incident.snapshot.started

    return [each for each in again if was_known(each) and not each.recorded]


def measure_worst_delay(events: Iterable[Event]) -> float:
    """The longest that a task took from its publish to its first end, beyond the time that it was meant to take."""
    due: dict[str, float] = {}
    ended: dict[str, float] = {}
    for event in events:
        if event.word == "sent":
            due[event.task] = event.at + event.number
        elif event.word == "end":
            ended[event.task] = min(event.at, ended.get(event.task, event.at))
    return max((ended[task] - at for task, at in due.items() if task in ended), default=0.0)
