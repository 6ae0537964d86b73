"""One run: start nodes and load, let the fault strike, wait until all tasks have ended, count."""

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tests.chaos.event_log import ALLOWED, DIED, STOCK_HOST, Event, Incident
from tests.chaos.faults import CONTAINER_FAULTS, FAULTS
from tests.chaos.faults.fault import Fault
from tests.chaos.faults.nodes import POISONS, count_starts
from tests.chaos.second_starts import (
    SecondStart,
    find_excessive,
    find_second_starts,
    find_unrecorded,
    measure_worst_delay,
)
from tests.chaos.subjects import CONCURRENCY, STALK, STOCK
from tests.chaos.testbeds.base import NODES, Plan
from tests.chaos.testbeds.containers import ContainerStack, ContainerTestbed
from tests.chaos.testbeds.processes import ProcessTestbed, open_testbed
from tests.support.processes import Process

Testbed = ProcessTestbed | ContainerTestbed

# A task that kombu's transport has popped is nowhere in Redis until it is recorded as unacked: for a moment, on a busy
# machine for a second. Stalk moves it atomically.
NOWHERE_SECONDS = 6.0
# Beyond the time after which messages of a dead node are requeued: a sweep, and a busy machine. Only tasks that are
# never requeued take so long. kombu's transport often leaves some, so it gets less.
QUIET_SECONDS, STOCK_QUIET_SECONDS = 30.0, 10.0
# The end of the wait in any case.
LONGEST_SECONDS = 900.0
# Each check reads all of Redis.
LOOK_SECONDS = 0.3


@dataclass(frozen=True)
class Outcome:
    """What became of the tasks of a run."""

    fault: str
    pool: str
    subject: str
    times: int
    lease: int
    sent: int
    executed: int
    # Sent, not executed, and nowhere in Redis; without those that Redis never kept.
    lost: list[str]
    never_kept: list[str]
    # Sent and still in Redis when the wait has ended.
    waiting: list[str]
    parked: int
    # Cause → how many.
    twice: dict[str, int]
    # Of those, the ones whose delivery_count had grown.
    recorded: int
    worst: float
    seconds: float
    exits: list[str]
    remarks: list[str]
    # How often each poison has started.
    poisoned: dict[str, int] = field(default_factory=dict)
    # What the contract does not allow, and the logs then.
    breaches: list[str] = field(default_factory=list)
    story: str = ""

    def describe(self) -> str:
        """The breaches, and then the remarks and logs."""
        return "\n".join([*self.breaches, *self.remarks, self.story])


def run(plan: Plan, directory: Path) -> Outcome:
    """Carry a plan out on processes of this machine, with their files in this directory."""
    fault = FAULTS[plan.fault]
    with open_testbed(directory, plan, proxied=fault.proxied) as testbed:
        return carry_out(testbed, partial(strike, testbed, fault))


def run_in_containers(container_stack: ContainerStack, plan: Plan) -> Outcome:
    """Carry a plan out on the shipped containers."""
    testbed = container_stack.start_run(plan)
    producer = testbed.load()
    try:
        return carry_out(testbed, partial(strike_containers, testbed, producer))
    finally:
        producer.end()


def carry_out(testbed: Testbed, strikes: Callable[[], None]) -> Outcome:
    """Let the fault strike and count what became of the tasks.

    An assertion that fails meanwhile is a breach in the outcome: other runs are worth carrying out all the same.
    """
    try:
        strikes()
    except AssertionError as error:
        story = f"{error}\n{testbed.describe()}"
        return replace(count_outcome(testbed), breaches=[str(error).partition("\n")[0]], story=story)
    wait_settled(testbed)
    return count_outcome(testbed)


def strike_containers(testbed: ContainerTestbed, producer: Process) -> None:
    """Let the fault strike as often as planned, and wait until all is sent."""
    for _ in range(testbed.plan.times):
        CONTAINER_FAULTS[testbed.plan.fault].strike(testbed)
        testbed.wait_progress()
    testbed.stop_file.touch()
    testbed.wait(lambda: not producer.alive, testbed.send_seconds, "all is sent")
    assert producer.code == 0, producer.tail()


def strike(testbed: ProcessTestbed, fault: Fault) -> None:
    """Start the nodes and the load, and let the fault strike as often as planned."""
    subjects = [testbed.plan.subject] * NODES
    if fault.name == "mixed_workers":
        # Stock workers use the visibility timeout; Stalk requires time limits below it.
        lease, subjects = testbed.plan.lease, [STALK, STOCK]
        testbed.more |= {"CELERY_VISIBILITY_TIMEOUT": str(lease), "CELERY_TASK_TIME_LIMIT": str(lease - 1)}
    testbed.load(fault.load, fault.seconds, subjects)
    for _ in range(testbed.plan.times):
        fault.strike(testbed)
        if fault.load:
            testbed.wait_progress()
            testbed.wait_short_queue()
    testbed.stop_producers()


def wait_settled(testbed: Testbed) -> None:
    """Wait until all tasks are executed or gone, or until nothing has changed for long enough."""
    plan = testbed.plan
    # A lease to run out and, where no node was there to sweep, one in which the living nodes renew theirs.
    quiet = plan.lease * 2 + (QUIET_SECONDS if plan.subject == STALK else STOCK_QUIET_SECONDS)
    began = moved = monotonic()
    before: Any = None
    while monotonic() - began < LONGEST_SECONDS:
        testbed.replace_ended()
        stored, missing = exclude_poison(testbed.take_snapshot().stored), find_unexecuted(testbed)
        # Poison that is redelivered for ever does not count as a change.
        now = (sum(1 for event in testbed.events.all() if exclude_poison({event.task})), stored, missing)
        if now != before:
            before, moved = now, monotonic()
        still = monotonic() - moved
        if not stored and not is_working(testbed) and (not missing or still > NOWHERE_SECONDS):
            return
        if still > quiet:
            return
        sleep(LOOK_SECONDS)
    testbed.remarks.append(f"still moving after {LONGEST_SECONDS:g} s")


def exclude_poison(tasks: Set[str]) -> set[str]:
    """The tasks without poison: those that are expected to end."""
    return {task for task in tasks if not task.startswith(tuple(f"chaos-{label}" for label in POISONS))}


def find_unexecuted(testbed: Testbed) -> set[str]:
    return exclude_poison(testbed.events.tasks("sent") - testbed.events.tasks("end"))


def is_working(testbed: Testbed) -> bool:
    """Whether a living node runs a task other than poison."""
    alive = testbed.living_nodes()
    return any(event.node in alive and exclude_poison({event.task}) for event in testbed.events.running())


def count_outcome(testbed: Testbed) -> Outcome:
    """The outcome, from the event log and Redis."""
    plan, events = testbed.plan, testbed.events.all()
    stored, missing, sent = testbed.take_snapshot().stored, find_unexecuted(testbed), testbed.events.tasks("sent")
    starts = find_second_starts(events, testbed.incidents, plan.subject == STALK)
    again = [each for each in starts if exclude_poison({each.start.task})]
    gone = missing - stored
    outcome = Outcome(
        fault=plan.fault,
        pool=plan.pool,
        subject=plan.subject.name,
        times=plan.times,
        lease=plan.lease,
        sent=len(exclude_poison(sent)),
        executed=len(exclude_poison(sent & testbed.events.tasks("end"))),
        lost=sorted(gone - testbed.never_kept),
        never_kept=sorted(gone & testbed.never_kept),
        waiting=sorted(missing & stored),
        parked=testbed.count_parked(),
        twice=dict(Counter(each.why for each in again)),
        recorded=sum(1 for each in again if each.recorded),
        worst=measure_worst_delay(events),
        seconds=monotonic() - testbed.began,
        exits=testbed.exits,
        remarks=testbed.remarks,
        poisoned=count_starts(events) if plan.fault == "poison" else {},
    )
    found = find_breaches(outcome, again, events, testbed.incidents)
    return replace(outcome, breaches=found, story=testbed.describe() if found else "")


def find_breaches(
    outcome: Outcome, again: list[SecondStart], events: list[Event], incidents: list[Incident]
) -> list[str]:
    """Sentences about everything that the contract does not allow."""
    # Exits and dead letters are expected in the run of poison only.
    poisoned = outcome.fault == "poison"
    excused = find_lost_by_stock(outcome, events, incidents) if outcome.fault == "mixed_workers" else set()
    found = [f"lost: {task}" for task in outcome.lost if task not in excused]
    found += [f"still waiting: {task}" for task in outcome.waiting]
    found += [f"started twice: {each}" for each in again if each.why not in ALLOWED]
    found += find_excessive(again, NODES * CONCURRENCY[outcome.pool])
    found += [f"started twice without a higher delivery_count: {each}" for each in find_unrecorded(again)]
    found += [] if poisoned else outcome.exits
    parked = len(POISONS) if poisoned else 0
    found += [] if outcome.parked == parked else [f"{outcome.parked} dead letters in place of {parked}"]
    return found


def find_lost_by_stock(outcome: Outcome, events: list[Event], incidents: list[Incident]) -> set[str]:
    """Tasks that can be lost because stock nodes were killed.

    Once each what it had popped, which nobody has started, and for each task at work a chord that it was completing.
    """
    kills = sum(1 for incident in incidents if incident.kind == DIED and incident.node.endswith(STOCK_HOST))
    started = {event.task for event in events if event.word == "start"}
    bodies = [task for task in outcome.lost if task.endswith("-body")]
    popped = [task for task in outcome.lost if task not in bodies and task not in started]
    return {*popped[:kills], *bodies[: kills * CONCURRENCY[outcome.pool]]}
