"""What this process holds of one broker. Connections and channels come and go; this stays.

The consumer claims and acknowledges here, pool threads as well; everything that talks to Redis is left to the
keeper (lease.py), so that nobody waits for the network to say that a task is done.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace

from services.delivery.ack_buffer import AckBuffer
from services.delivery.shared_leases import NOTHING, Board, Notice

# Suspended machines and stopped processes have to see that time went on.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# Two renewals may fail before a lease runs out.
RENEWALS_PER_LEASE = 3
# A keeper that cannot reach Redis cannot keep the bound of the buffer; nobody waits for longer than this.
LONGEST_ACK_WAIT_SECONDS = 1.0


def clock() -> float:
    """Seconds that also pass while this process or its machine stands still."""
    return time.clock_gettime(CLOCK)


# What becomes a dead letter beside messages that no worker can run: tasks that failed with their last retry, and
# tasks that were rejected without being requeued.
RETRIES = "retries"
REJECTS = "rejects"
# Reasons of dead letters.
UNDECODABLE = "undecodable"
UNKNOWN_TASK = "unknown-task"
REJECTED = "rejected"
RETRIES_EXHAUSTED = "retries-exhausted"


@dataclass(frozen=True)
class Rules:
    """The settings of deliveries; times in seconds."""

    lease: int
    max_deliveries: int
    visibility_timeout: int
    priority_steps: tuple[int, ...]
    dead_letters: tuple[str, ...] = (RETRIES, REJECTS)
    dead_letters_max: int = 10_000
    max_requeues: int = 100

    @property
    def renewal(self) -> float:
        """Seconds from one renewal of a lease to the next."""
        return self.lease / RENEWALS_PER_LEASE


@dataclass(slots=True)
class Held:
    """One delivery: claimed, and neither acknowledged nor given back."""

    tag: str
    channel: int
    # By the process's own clock, and counted from before Redis was asked: never later than what Redis thinks.
    until: float
    # Whether the pool has it: it may run at any moment, and only its end settles it.
    handed: bool = False
    started: bool = False
    # The id of its task while it is on its way to wait in Redis.
    leaving: str = ""
    # What a child of the pool is told about it.
    notice: Notice | None = None

    def renew(self, until: float) -> None:
        """It is ours until then."""
        self.until = until
        if self.notice:
            self.notice.change(until)


@dataclass(frozen=True)
class Crash:
    """The process that ran `tag` has died."""

    tag: str
    detail: str


@dataclass(frozen=True)
class Requeue:
    """The task that `tag` stands for asks to be run later."""

    tag: str
    task_id: str


@dataclass(frozen=True)
class Rejection:
    """`tag` goes no further. `told`: its task says FAILURE already."""

    tag: str
    reason: str
    detail: str
    told: bool


@dataclass(frozen=True)
class Postponement:
    """`tag` waits in Redis until `due` (Unix time), under the id of its task; for a token of its rate, if given."""

    tag: str
    due: float
    task_id: str
    token: str = ""


@dataclass
class Work:
    """What the keeper has to tell Redis. Each can be repeated: the second time there is nothing left to do."""

    acks: list[str] = field(default_factory=list)
    returns: list[str] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    requeues: list[Requeue] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    postponements: list[Postponement] = field(default_factory=list)

    def add(self, other: Work) -> None:
        """Take over what another one says."""
        self.acks += other.acks
        self.returns += other.returns
        self.crashes += other.crashes
        self.requeues += other.requeues
        self.rejections += other.rejections
        self.postponements += other.postponements

    def __bool__(self) -> bool:
        return any((self.acks, self.returns, self.crashes, self.requeues, self.rejections, self.postponements))


class Holder:
    """The deliveries that this process holds, and what is still to be said about those it does not."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.changed = threading.Condition()
        self.closing = False
        # Asked for a tag whose lease ends soon, or may have run out: whether it is still ours, and renewed.
        self.confirm: Callable[[str], bool] = lambda tag: False
        self.mark_started: Callable[[str, list[str]], None] = lambda tag, acks: None
        # Called before the first claim over a connection: what that brings may start before the keeper's next turn.
        self.prepare_marks: Callable[[], None] = lambda: None
        # Called after a place has become free, from whatever thread that was: one for each connection that consumes.
        self._bells: tuple[Callable[[], None], ...] = ()
        self._pid = os.getpid()
        self._held: dict[str, Held] = {}
        self._acks = AckBuffer()
        self._work = Work()
        self._waiting: Counter[int] = Counter()
        self._handed = 0

    @property
    def own(self) -> bool:
        """False in a child that was forked: what the parent holds is none of its business."""
        return self._pid == os.getpid()

    # The consumer's side.

    def hold(self, tags: Iterable[str], channel: int, since: float) -> None:
        """These were claimed with a question that was sent at `since`."""
        with self.changed:
            for tag in tags:
                self._held[tag] = Held(tag, channel, since + self.rules.lease)
                self._waiting[channel] += 1

    def used(self, channel: int) -> int:
        """How much of a channel's prefetch count is used up."""
        return self._handed + self._waiting[channel]

    def holds(self, tag: str) -> bool:
        return tag in self._held

    def handed(self, tag: str) -> bool:
        """Whether the pool has it, or has had it."""
        held = self._held.get(tag)
        return held is None or held.handed

    def started(self, tag: str) -> bool:
        """Whether its task has begun to run, as far as anybody here remembers."""
        held = self._held.get(tag)
        return held is None or held.started

    def ring_for_credit(self, bell: Callable[[], None]) -> None:
        """Have `bell` called whenever a place becomes free, from whatever thread that is."""
        with self.changed:
            self._bells = (*self._bells, bell)

    def ring_no_more(self, bell: Callable[[], None]) -> None:
        """Whoever waited for `bell` is gone."""
        with self.changed:
            self._bells = tuple(other for other in self._bells if other != bell)

    def still_ours(self, tag: str) -> bool:
        """Whether it may be delivered: it is held, and this process has not stood still for longer than its lease."""
        return self._sure(tag) is not None

    def hand_over(self, tag: str) -> bool:
        """The pool is about to get it. False: it is not ours any more and must not be run."""
        held = self._sure(tag)
        if not held:
            return False
        with self.changed:
            if self._held.get(tag) is not held:
                return False
            if not held.handed:
                held.handed = True
                self._waiting[held.channel] -= 1
                self._handed += 1
        return True

    def show(self, tag: str, board: Board) -> int:
        """Have a board say until when it is ours. Returns its number there; that of nothing when it is not ours."""
        with self.changed:
            held = self._held.get(tag)
            if not held:
                return NOTHING
            held.notice = board.put_up(held.until)
            return held.notice.number

    def start(self, tag: str, *, here: bool = False) -> bool:
        """Its task is about to run; `here`: in this process. False: it is not ours any more and must not be run."""
        held = self._sure(tag)
        if not held:
            return False
        held.started = True
        # A task that kills its process must not take those along that had come to their end: they would run again,
        # and after some such deaths be taken for the killers.
        self.mark_started(tag, self._mention() if here else [])
        return True

    def _mention(self) -> list[str]:
        with self.changed:
            return self._acks.mention()

    def _sure(self, tag: str) -> Held | None:
        """What is held under `tag`, if its lease lasts for longer than it takes to renew it."""
        held = self._held.get(tag)
        # Less is left when renewals have failed, or when the answer to a claim was long on its way.
        if held and clock() >= held.until - self.rules.renewal and not self.confirm(tag):
            # Redis may have given it to somebody else. If not, its lease ends there too, and somebody will get it.
            self._drop(tag)
            return None
        return held

    # The end of a delivery, in six ways.

    def ack(self, tag: str) -> None:
        """It is done. Waits while the buffer of acknowledgements is full."""
        with self.changed:
            if not self._drop(tag):
                return
            first = self._acks.due is None
            self._acks.add(tag, clock())
            if first or self._acks.full:
                self.changed.notify_all()
            if self._acks.full:
                self.changed.wait_for(lambda: not self._acks.full or self.closing, LONGEST_ACK_WAIT_SECONDS)

    def give_back(self, tags: Iterable[str]) -> None:
        """They will not be run here; that is no crash and does not count."""
        with self.changed:
            self._work.returns.extend(tag for tag in tags if self._drop(tag))
            self.changed.notify_all()

    def abandon(self, claim: str, credit: int) -> None:
        """The answer to this claim was lost: whatever it has taken goes back."""
        with self.changed:
            self._work.returns.extend(f"{claim}:{number}" for number in range(1, credit + 1))
            self.changed.notify_all()

    def crash(self, tag: str, detail: str) -> None:
        """The process that ran it has died."""
        with self.changed:
            if self._drop(tag):
                self._work.crashes.append(Crash(tag, detail))
                self.changed.notify_all()

    def requeue(self, tag: str, task_id: str) -> None:
        """Its task wants to be run later."""
        with self.changed:
            if self._drop(tag):
                self._work.requeues.append(Requeue(tag, task_id))
                self.changed.notify_all()

    def keeps(self, kind: str) -> bool:
        """Whether such failures become dead letters: RETRIES or REJECTS."""
        return kind in self.rules.dead_letters

    def reject(self, tag: str, reason: str, detail: str, *, told: bool = False) -> None:
        """It becomes a dead letter, unless that is switched off for such a reason."""
        if reason == REJECTED and not self.keeps(REJECTS):
            self.ack(tag)
            return
        with self.changed:
            if self._drop(tag):
                self._work.rejections.append(Rejection(tag, reason, detail, told))
                self.changed.notify_all()

    def postpone(self, tag: str, due: float, task_id: str, token: str = "") -> None:
        """It waits in Redis until `due`, for `token` if that is given. Its place becomes free when Redis has it."""
        with self.changed:
            if held := self._held.get(tag):
                held.leaving = task_id
                self._work.postponements.append(Postponement(tag, due, task_id, token))
                self.changed.notify_all()

    def wait_left(self, task_ids: Container[str] | None, seconds: float) -> None:
        """Wait until none of these tasks, None: no task at all, is on its way to wait in Redis."""
        with self.changed:
            self.changed.wait_for(lambda: not self._leaving(task_ids), seconds)

    def _leaving(self, task_ids: Container[str] | None) -> bool:
        leaving = [held.leaving for held in self._held.values() if held.leaving]
        return any(task_ids is None or task_id in task_ids for task_id in leaving)

    def release(self, channel: int) -> None:
        """A channel closes: what it has claimed goes back, except what the pool has."""
        self.give_back([held.tag for held in list(self._held.values()) if held.channel == channel and not held.handed])

    def release_all(self) -> None:
        """This process ends: everything goes back."""
        self.give_back(list(self._held))

    def _drop(self, tag: str) -> bool:
        with self.changed:
            held = self._held.pop(tag, None)
            if not held:
                return False
            if held.notice:
                held.notice.take_down()
            if held.handed:
                self._handed -= 1
            else:
                self._waiting[held.channel] -= 1
        for ring in self._bells:
            ring()
        return True

    # The keeper's side.

    def acks_for_claim(self) -> list[str]:
        """Acknowledgements that go along with a claim; `sent` or `unsent` follows."""
        with self.changed:
            return self._acks.take()

    def sent(self, acks: list[str]) -> None:
        """Redis knows these acknowledgements."""
        self.settled(Work(acks=acks))

    def unsent(self, acks: list[str]) -> None:
        """Redis may not know them."""
        self.unsettled(Work(acks=acks))

    def take_work(self) -> Work:
        """What is to be told to Redis; `settled` or `unsettled` follows."""
        with self.changed:
            work, self._work = self._work, Work()
            work.acks = self._acks.take()
            return work

    def settled(self, work: Work) -> None:
        """Redis knows it."""
        with self.changed:
            self._acks.sent(work.acks)
            for postponement in work.postponements:
                self._drop(postponement.tag)
            self.changed.notify_all()

    def unsettled(self, work: Work) -> None:
        """Redis may not know it: it has to be told again."""
        with self.changed:
            self.changed.notify_all()
            self._acks.put_back(work.acks)
            newer, self._work = self._work, replace(work, acks=[])
            self._work.add(newer)

    def ack_due(self) -> float | None:
        """When the oldest acknowledgement has to be sent, by `clock`; None when there is none."""
        return self._acks.due

    @property
    def urgent(self) -> bool:
        """Whether there is work that should not wait."""
        return bool(self._work) or self._acks.full

    @property
    def idle(self) -> bool:
        """Whether Redis knows everything."""
        return not self._work and self._acks.empty

    def leased(self) -> tuple[list[str], list[str]]:
        """The tags to renew: of tasks that run, and of the others.

        Among those what has ended here and Redis refuses to hear of: it would run again.
        """
        with self.changed:
            held, work = list(self._held.values()), self._work
            ended: list[Crash | Requeue | Rejection] = [*work.crashes, *work.requeues, *work.rejections]
        others = [one.tag for one in held if not one.started]
        return [one.tag for one in held if one.started], [*others, *(one.tag for one in ended)]

    def renewed(self, tags: Iterable[str], lost: Iterable[str], since: float) -> list[Held]:
        """Redis has renewed `tags`, asked at `since`, except `lost`. Returns those that were still held."""
        gone = set(lost)
        with self.changed:
            for tag in tags:
                if tag not in gone and (held := self._held.get(tag)):
                    held.renew(since + self.rules.lease)
            taken = [held for tag in gone if (held := self._held.get(tag))]
            for held in taken:
                self._drop(held.tag)
        return taken

    def __len__(self) -> int:
        return len(self._held)
