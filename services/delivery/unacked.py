"""The deliveries that this process has claimed from one broker and not acknowledged yet.

Connections and channels come and go; this stays. The consumer and the threads of a pool say here what becomes of a
delivery; the lease manager (lease_manager.py) tells Redis, so that nobody waits for the network to acknowledge a task.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Self

from celery.utils.log import get_logger
from redis.exceptions import RedisError

from services.delivery.ack_buffer import AckBuffer
from services.delivery.leases import Leases
from services.delivery.shared_leases import NOTHING, LeaseSlot, SharedLeaseTable

logger = get_logger(__name__)

# Its seconds pass while a process is stopped or its machine suspended, as those of a lease do.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# Two renewals may fail before a lease runs out.
RENEWALS_PER_LEASE = 3
# Without Redis the buffer of acknowledgements is not emptied; a task that ends waits no longer than this for room.
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
class Delivery:
    """One delivery: claimed, and neither acknowledged nor requeued."""

    tag: str
    channel: int
    # End of the lease by `clock`, counted from before the claim was sent: never later than Redis thinks.
    until: float
    # Whether the pool has it: it may run at any moment, and only its end settles it.
    in_pool: bool = False
    started: bool = False
    # The id of its task while it is on its way to wait in Redis.
    postponed: str = ""
    # Where the pool's children read the end of its lease.
    slot: LeaseSlot | None = None

    def renew(self, until: float) -> None:
        """Set the end of its lease."""
        self.until = until
        if self.slot:
            self.slot.set(until)


@dataclass(frozen=True)
class Crash:
    """The process that ran `tag` has died."""

    tag: str
    detail: str


@dataclass(frozen=True)
class LaterRequeue:
    """The task of `tag` asks to be run again later, by Reject(requeue=True) for instance."""

    tag: str
    task_id: str


@dataclass(frozen=True)
class Rejection:
    """`tag` becomes a dead letter. `reported`: FAILURE is stored for its task already."""

    tag: str
    reason: str
    detail: str
    reported: bool


@dataclass(frozen=True)
class Postponement:
    """`tag` waits in Redis until `due` (Unix time) under the id of its task; for a token of its rate, if given."""

    tag: str
    due: float
    task_id: str
    token: str = ""


@dataclass
class PendingUpdates:
    """What Redis has still to be told. Each update is idempotent: the second time it changes nothing."""

    acks: list[str] = field(default_factory=list)
    requeues: list[str] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    later_requeues: list[LaterRequeue] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    postponements: list[Postponement] = field(default_factory=list)

    def add(self, other: Self) -> None:
        """Append another one's updates."""
        for name, updates in vars(self).items():
            updates.extend(getattr(other, name))

    def __bool__(self) -> bool:
        return any(vars(self).values())


class UnackedDeliveries:
    """The deliveries that this process has, and what Redis has still to be told of those that it had."""

    def __init__(self, rules: Rules, leases: Leases) -> None:
        self.rules, self.leases = rules, leases
        self.changed = threading.Condition()
        self.closing = False
        # Called after prefetch credit has become free, in whatever thread that was: one for each connection.
        self._credit_listeners: tuple[Callable[[], None], ...] = ()
        self._pid = os.getpid()
        self._deliveries: dict[str, Delivery] = {}
        self._acks = AckBuffer()
        self._pending = PendingUpdates()
        self._waiting: Counter[int] = Counter()
        self._in_pool = 0

    @property
    def is_of_this_process(self) -> bool:
        """False in a child that was forked: the deliveries are its parent's."""
        return self._pid == os.getpid()

    # Used by the consumer.

    def add(self, tags: Iterable[str], channel: int, since: float) -> None:
        """Record what a claim that was sent at `since` has brought."""
        with self.changed:
            for tag in tags:
                self._deliveries[tag] = Delivery(tag, channel, since + self.rules.lease)
                self._waiting[channel] += 1

    def count_used(self, channel: int) -> int:
        """How much of a channel's prefetch count is used up."""
        return self._in_pool + self._waiting[channel]

    def holds(self, tag: str) -> bool:
        return tag in self._deliveries

    def is_in_pool(self, tag: str) -> bool:
        """Whether the pool has it, or has had it."""
        delivery = self._deliveries.get(tag)
        return delivery is None or delivery.in_pool

    def has_started(self, tag: str) -> bool:
        """Whether its task has begun to run, as far as this process still knows."""
        delivery = self._deliveries.get(tag)
        return delivery is None or delivery.started

    def add_credit_listener(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever prefetch credit becomes free, in whatever thread that is."""
        with self.changed:
            self._credit_listeners = (*self._credit_listeners, listener)

    def remove_credit_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` no more."""
        with self.changed:
            self._credit_listeners = tuple(other for other in self._credit_listeners if other != listener)

    def has_valid_lease(self, tag: str) -> bool:
        """Whether it may be delivered: this process has it, and has not stood still for longer than its lease."""
        return self._find_leased(tag) is not None

    def hand_to_pool(self, tag: str) -> bool:
        """Note that the pool is about to get it. False: its lease was lost, and it must not be run."""
        delivery = self._find_leased(tag)
        if not delivery:
            return False
        with self.changed:
            if self._deliveries.get(tag) is not delivery:
                return False
            if not delivery.in_pool:
                delivery.in_pool = True
                self._waiting[delivery.channel] -= 1
                self._in_pool += 1
        return True

    def share_lease(self, tag: str, table: SharedLeaseTable) -> int:
        """Show the pool's children in `table` until when its lease lasts. Returns its number there, or NOTHING."""
        with self.changed:
            delivery = self._deliveries.get(tag)
            if not delivery:
                return NOTHING
            delivery.slot = table.add(delivery.until)
            return delivery.slot.number

    def start(self, tag: str, *, here: bool = False) -> bool:
        """Mark its task as started; `here`: in this process. False: its lease was lost, and it must not be run."""
        delivery = self._find_leased(tag)
        if not delivery:
            return False
        delivery.started = True
        # A task that kills its process must not take those along that had ended: they would run again, and after
        # some such deaths count as the killers.
        self.leases.mark_started(tag, self._list_unmentioned_acks() if here else [])
        return True

    def _list_unmentioned_acks(self) -> list[str]:
        with self.changed:
            return self._acks.list_unmentioned()

    def _find_leased(self, tag: str) -> Delivery | None:
        """The delivery, if its lease lasts for longer than it takes to renew it, or can be renewed now."""
        delivery = self._deliveries.get(tag)
        # Less is left when renewals have failed, or when the reply to a claim took long.
        if delivery and clock() >= delivery.until - self.rules.renewal and not self._renew_now(tag):
            # Redis may have given it to somebody else. If not, its lease ends there too, and somebody will get it.
            self._remove(tag)
            return None
        return delivery

    def _renew_now(self, tag: str) -> bool:
        try:
            self._renew([], [tag])
        except (RedisError, OSError):
            return False
        return self.holds(tag)

    # The end of a delivery, in six ways.

    def ack(self, tag: str) -> None:
        """Acknowledge it; block while the buffer of acknowledgements is full."""
        with self.changed:
            if not self._remove(tag):
                return
            first = self._acks.due is None
            self._acks.add(tag, clock())
            if first or self._acks.full:
                self.changed.notify_all()
            if self._acks.full:
                self.changed.wait_for(lambda: not self._acks.full or self.closing, LONGEST_ACK_WAIT_SECONDS)

    def requeue(self, tags: Iterable[str]) -> None:
        """Put them back into their queues, as they will not be run here; this counts as no delivery."""
        with self.changed:
            self._pending.requeues.extend(tag for tag in tags if self._remove(tag))
            self.changed.notify_all()

    def requeue_claim(self, claim: str, credit: int) -> None:
        """Put back whatever a claim has taken whose reply was lost."""
        with self.changed:
            self._pending.requeues.extend(f"{claim}:{number}" for number in range(1, credit + 1))
            self.changed.notify_all()

    def requeue_channel(self, channel: int) -> None:
        """Put back what a channel has claimed that closes, except what the pool has."""
        waiting = [one.tag for one in list(self._deliveries.values()) if one.channel == channel and not one.in_pool]
        self.requeue(waiting)

    def requeue_all(self) -> None:
        """Put everything back, because this process ends."""
        self.requeue(list(self._deliveries))

    def record_crash(self, tag: str, detail: str) -> None:
        """Requeue it, and count it: the process that ran it has died."""
        with self.changed:
            if self._remove(tag):
                self._pending.crashes.append(Crash(tag, detail))
                self.changed.notify_all()

    def requeue_later(self, tag: str, task_id: str) -> None:
        """Have it run again later, as its task asks for."""
        with self.changed:
            if self._remove(tag):
                self._pending.later_requeues.append(LaterRequeue(tag, task_id))
                self.changed.notify_all()

    def keeps_as_dead_letter(self, kind: str) -> bool:
        """Whether such failures become dead letters: RETRIES or REJECTS."""
        return kind in self.rules.dead_letters

    def reject(self, tag: str, reason: str, detail: str, *, reported: bool = False) -> None:
        """Make it a dead letter, unless WORKER_DEAD_LETTERS keeps none of such a reason."""
        if reason == REJECTED and not self.keeps_as_dead_letter(REJECTS):
            self.ack(tag)
            return
        with self.changed:
            if self._remove(tag):
                self._pending.rejections.append(Rejection(tag, reason, detail, reported))
                self.changed.notify_all()

    def postpone(self, tag: str, due: float, task_id: str, token: str = "") -> None:
        """Let it wait in Redis until `due`, for `token` if given. Its credit becomes free when Redis has it."""
        with self.changed:
            if delivery := self._deliveries.get(tag):
                delivery.postponed = task_id
                self._pending.postponements.append(Postponement(tag, due, task_id, token))
                self.changed.notify_all()

    def wait_until_postponed(self, task_ids: Container[str] | None, seconds: float) -> None:
        """Wait until none of these tasks (None: of all tasks) is on its way to wait in Redis."""
        with self.changed:
            self.changed.wait_for(lambda: not self._is_postponing(task_ids), seconds)

    def _is_postponing(self, task_ids: Container[str] | None) -> bool:
        under_way = [delivery.postponed for delivery in self._deliveries.values() if delivery.postponed]
        return any(task_ids is None or task_id in task_ids for task_id in under_way)

    def _remove(self, tag: str) -> bool:
        with self.changed:
            delivery = self._deliveries.pop(tag, None)
            if not delivery:
                return False
            if delivery.slot:
                delivery.slot.clear()
            if delivery.in_pool:
                self._in_pool -= 1
            else:
                self._waiting[delivery.channel] -= 1
        for listener in self._credit_listeners:
            listener()
        return True

    # Used by the claim and by the lease manager, who tell Redis.

    def take_acks(self) -> list[str]:
        """Acknowledgements that go along with a claim; `commit_acks` or `rollback_acks` follows."""
        with self.changed:
            return self._acks.take()

    def commit_acks(self, acks: list[str]) -> None:
        """Forget these acknowledgements: Redis has them."""
        self.commit(PendingUpdates(acks=acks))

    def rollback_acks(self, acks: list[str]) -> None:
        """Keep these acknowledgements: Redis may not have them."""
        self.rollback(PendingUpdates(acks=acks))

    def take_pending(self) -> PendingUpdates:
        """What Redis has to be told; `commit` or `rollback` follows."""
        with self.changed:
            pending, self._pending = self._pending, PendingUpdates()
            pending.acks = self._acks.take()
            return pending

    def commit(self, updates: PendingUpdates) -> None:
        """Forget these updates: Redis has them."""
        with self.changed:
            self._acks.confirm(updates.acks)
            for postponement in updates.postponements:
                self._remove(postponement.tag)
            self.changed.notify_all()

    def rollback(self, updates: PendingUpdates) -> None:
        """Keep these updates, before those that came since: Redis may not have them."""
        with self.changed:
            self.changed.notify_all()
            self._acks.put_back(updates.acks)
            newer, self._pending = self._pending, replace(updates, acks=[])
            self._pending.add(newer)

    def ack_due(self) -> float | None:
        """When the oldest acknowledgement has to be sent, by `clock`; None when there is none."""
        return self._acks.due

    @property
    def is_urgent(self) -> bool:
        """Whether there are updates that should not wait."""
        return bool(self._pending) or self._acks.full

    @property
    def is_idle(self) -> bool:
        """Whether Redis has been told everything."""
        return not self._pending and self._acks.empty

    def running(self) -> list[str]:
        """The tags of what has started and not ended: of batches too, which Celery has no request of."""
        with self.changed:
            return [delivery.tag for delivery in self._deliveries.values() if delivery.started]

    def renew(self) -> None:
        """Renew all leases. Raises redis.exceptions.RedisError."""
        with self.changed:
            others = [delivery.tag for delivery in self._deliveries.values() if not delivery.started]
            # What has ended here and Redis refuses to hear of: without a lease it would run again.
            pending = self._pending
            ended: list[Crash | LaterRequeue | Rejection]
            ended = [*pending.crashes, *pending.later_requeues, *pending.rejections]
            started = self.running()
        if started or others or ended:
            self._renew(started, [*others, *(update.tag for update in ended)])

    def _renew(self, started: list[str], others: list[str]) -> None:
        since = clock()
        lost = set(self.leases.renew(started, others))
        with self.changed:
            for tag in (*started, *others):
                if tag not in lost and (delivery := self._deliveries.get(tag)):
                    delivery.renew(since + self.rules.lease)
            gone = [delivery for tag in lost if (delivery := self._deliveries.get(tag))]
            for delivery in gone:
                self._remove(delivery.tag)
        for delivery in gone:
            if delivery.started:
                logger.warning("lease: %s was lost while its task runs; it may run again elsewhere", delivery.tag)
            else:
                logger.warning("lease: %s was lost before its task was started; it is not started", delivery.tag)

    def __len__(self) -> int:
        return len(self._deliveries)
