"""One run: start, strike while tasks come, wait until nothing moves any more, count."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol

from tests.chaos.arena import NODES, Arena, Plan, opened
from tests.chaos.faults import FAULTS, POISONS, Fault, starts
from tests.chaos.marks import (
    ALLOWED,
    DIED,
    STOCK_HOST,
    Again,
    Incident,
    Mark,
    Marks,
    second_starts,
    too_many,
    unrecorded,
    worst_delay,
)
from tests.chaos.subjects import CONCURRENCY, STALK, STOCK

# A task that kombu's transport has taken is nowhere until it is written down: for a moment, on a busy machine for a
# second. In Stalk's Redis each is somewhere at every moment.
NOWHERE_SECONDS = 6.0
# Beyond the time in which all that a dead node held must have come back: a sweep, and a busy machine. Only what never
# comes back takes so long; that kombu's transport leaves something is nothing new.
QUIET_SECONDS, STOCK_QUIET_SECONDS = 30.0, 10.0
# Whatever happens: something that never ends is a result too.
LONGEST_SECONDS = 900.0
# Each look reads all of Redis.
LOOK_SECONDS = 0.3


@dataclass(frozen=True)
class Outcome:
    """What a run has shown."""

    fault: str
    pool: str
    subject: str
    seed: int
    times: int
    lease: int
    sent: int
    refused: int
    executed: int
    # Sent, not executed, and nowhere in Redis; without those that Redis never kept.
    lost: list[str]
    never_kept: list[str]
    # Sent and still in Redis after all patience.
    waiting: list[str]
    parked: int
    # Why → how many.
    twice: dict[str, int]
    # Of those, the ones whose delivery_count says that they are not the first.
    recorded: int
    worst: float
    seconds: float
    exits: list[str]
    remarks: list[str]
    # How often each poison has started.
    poisoned: dict[str, int] = field(default_factory=dict)
    # What the contract does not allow, and what the processes said then.
    breaches: list[str] = field(default_factory=list)
    story: str = ""

    def told(self) -> str:
        """The breaches first, and then what there is to find out why."""
        return "\n".join([*self.breaches, *self.remarks, self.story])


def run(plan: Plan, directory: Path | None = None) -> Outcome:
    """Carry a plan out, in a directory that is kept, or in one that is not."""
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
            return run(plan, Path(temporary))
    fault = FAULTS[plan.fault]
    with opened(directory, plan, proxied=fault.proxied) as arena:
        try:
            strike(arena, fault)
        except AssertionError as error:
            # What was not as it had to be is a result too; the others are worth their run all the same.
            told = f"{error}\n{arena.describe()}"
            return replace(counted(arena), breaches=[str(error).partition("\n")[0]], story=told)
        settle(arena)
        return counted(arena)


def strike(arena: Arena, fault: Fault) -> None:
    """Start the nodes and the load, and let the fault strike as often as planned."""
    subjects = [arena.plan.subject] * NODES
    if fault.name == "mixed_workers":
        # A stock worker's tasks follow its own time-out; as Stalk checks it, tasks may not be longer.
        lease, subjects = arena.plan.lease, [STALK, STOCK]
        arena.more |= {"CELERY_VISIBILITY_TIMEOUT": str(lease), "CELERY_TASK_TIME_LIMIT": str(lease - 1)}
    arena.load(fault.load, fault.seconds, partial(arena.start_nodes, subjects))
    for _ in range(arena.plan.times):
        fault.strike(arena)
        if fault.load:
            arena.go_on()
            arena.work_off()
    arena.enough()


class Field(Protocol):
    """Where a run takes place: processes of this machine, or containers."""

    plan: Plan
    marks: Marks
    incidents: list[Incident]
    exits: list[str]
    remarks: list[str]
    never_kept: set[str]
    began: float

    def tend(self) -> None:
        """Replace what ended by itself."""

    def living(self) -> set[str]:
        """Nodes that may have something at work."""

    def in_redis(self) -> set[str]:
        """Tasks whose message is anywhere in Redis, unless it is parked."""

    def parked(self) -> int:
        """Dead letters."""

    def describe(self) -> str:
        """What the processes said."""


def settle(arena: Field) -> None:
    """Wait until all that was sent is executed or gone and Redis holds none of it, or nothing moves any more."""
    plan = arena.plan
    # A lease to run out and, where nobody was there to sweep, one in which the living renew theirs.
    quiet = plan.lease * 2 + (QUIET_SECONDS if plan.subject == STALK else STOCK_QUIET_SECONDS)
    began = moved = monotonic()
    before: Any = None
    while monotonic() - began < LONGEST_SECONDS:
        arena.tend()
        held, missing = awaited(arena.in_redis()), awaited(unexecuted(arena))
        # Poison that goes on for ever moves nothing.
        now = (sum(1 for mark in arena.marks.all() if awaited({mark.task})), held, missing)
        if now != before:
            before, moved = now, monotonic()
        still = monotonic() - moved
        if not held and not at_work(arena) and (not missing or still > NOWHERE_SECONDS):
            return
        if still > quiet:
            return
        sleep(LOOK_SECONDS)
    arena.remarks.append(f"still moving after {LONGEST_SECONDS:g} s")


def awaited(tasks: set[str]) -> set[str]:
    """Tasks that may be expected to come to their end."""
    return {task for task in tasks if not task.startswith(tuple(f"chaos-{label}" for label in POISONS))}


def unexecuted(arena: Field) -> set[str]:
    return arena.marks.tasks("sent") - arena.marks.tasks("end")


def at_work(arena: Field) -> bool:
    """Whether a living node runs something."""
    alive = arena.living()
    return any(mark.node in alive and awaited({mark.task}) for mark in arena.marks.running())


def counted(arena: Field) -> Outcome:
    """What the marks and Redis say in the end."""
    plan, marks = arena.plan, arena.marks.all()
    in_redis, missing = arena.in_redis(), awaited(unexecuted(arena))
    again = [
        each for each in second_starts(marks, arena.incidents, plan.subject == STALK) if awaited({each.start.task})
    ]
    gone = missing - in_redis
    outcome = Outcome(
        fault=plan.fault,
        pool=plan.pool,
        subject=plan.subject.name,
        seed=plan.seed,
        times=plan.times,
        lease=plan.lease,
        sent=len(awaited(arena.marks.tasks("sent"))),
        refused=len(arena.marks.tasks("refused")),
        executed=len(awaited(arena.marks.tasks("end") & arena.marks.tasks("sent"))),
        lost=sorted(gone - arena.never_kept),
        never_kept=sorted(gone & arena.never_kept),
        waiting=sorted(missing & in_redis),
        parked=arena.parked(),
        twice=dict(Counter(each.why for each in again)),
        recorded=sum(1 for each in again if each.recorded),
        worst=worst_delay(marks),
        seconds=monotonic() - arena.began,
        exits=arena.exits,
        remarks=arena.remarks,
        poisoned=starts(marks) if plan.fault == "poison" else {},
    )
    found = breaches(outcome, again, marks, arena.incidents)
    return replace(outcome, breaches=found, story=arena.describe() if found else "")


def breaches(outcome: Outcome, again: list[Again], marks: list[Mark], incidents: list[Incident]) -> list[str]:
    """Sentences about everything that the contract does not allow."""
    # Both are at home in the poison's run alone, where they are what has to happen.
    poisoned = outcome.fault == "poison"
    excused = lost_by_stock(outcome, marks, incidents) if outcome.fault == "mixed_workers" else set()
    held = NODES * CONCURRENCY[outcome.pool]
    found = [f"lost: {task}" for task in outcome.lost if task not in excused]
    found += [f"still waiting: {task}" for task in outcome.waiting]
    found += [f"started twice: {each}" for each in again if each.why not in ALLOWED]
    found += too_many(again, held)
    found += [f"started twice without a higher delivery_count: {each}" for each in unrecorded(again)]
    found += [] if poisoned else outcome.exits
    parked = len(POISONS) if poisoned else 0
    found += [] if outcome.parked == parked else [f"{outcome.parked} dead letters in place of {parked}"]
    return found


def lost_by_stock(outcome: Outcome, marks: list[Mark], incidents: list[Incident]) -> set[str]:
    """What can be gone because stock nodes were killed.

    Once each what it had popped, which nobody has started, and for each task at work a chord that it was completing.
    """
    kills = sum(1 for incident in incidents if incident.kind == DIED and incident.node.endswith(STOCK_HOST))
    started = {mark.task for mark in marks if mark.word == "start"}
    bodies = [task for task in outcome.lost if task.endswith("-body")]
    popped = [task for task in outcome.lost if task not in bodies and task not in started]
    return {*popped[:kills], *bodies[: kills * CONCURRENCY[outcome.pool]]}
