"""Deliveries against a model, step by step on a real Redis: no message is ever in zero places, or in two.

The model knows every list, every record and every dead letter, and after each step Redis has to have exactly that.
Nothing here runs by itself: processes claim, their lease managers send updates, and leases end when the test says so.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import kombu
import pytest
import redis
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.broker import headroom, keys, messages, scripts
from services.broker.retry import RetryState
from services.delayed import scheduled
from services.delivery import sweeper
from services.delivery.claim import Claim, ClaimIds, claim_command, parse_reply
from services.delivery.lease_manager import LeaseManager
from services.delivery.leases import Leases
from services.delivery.unacked import UNKNOWN_TASK, Rules, UnackedDeliveries, clock
from tests.integration.delivery.commands import ENDS, TASK, add_counts, drop_counts, read_counts, replay_letters
from tests.support.redis.server import RedisServer

pytestmark = pytest.mark.each_redis

T = TypeVar("T")

# So long that no lease ends by itself during an example.
RULES = Rules(lease=3600, max_deliveries=4, visibility_timeout=7200, priority_steps=keys.PRIORITY_STEPS, max_requeues=2)
# Names that need care between the quotes of a record.
QUEUES = ("celery", 'quo"te,d', "schön\\")
LETTERS = (keys.DEAD_LETTERS, keys.DEAD_LETTERS_UNTOLD)
PROCESSES = PRODUCERS = 3
LONG_AGO = 100_000
FILLER_BYTES = 20_000_000
MOSTLY = st.sampled_from([True, True, True, False])
# Enough to reach what takes several steps, such as a crash of the last delivery.
STEP_COUNT = 50
# Three seconds; and half a minute.
EXAMPLES = (20, pytest.param(200, marks=pytest.mark.slow))
MARK = re.compile(rb"<message (\d+)>")
# An example that is tried again has to come to the same.
SAME_CHANCE = scripts.Script.from_text(re.sub(r"(?<=math\.randomseed)\(.*\)", "(1)", scripts.SWEEP.text))

# What stands in a message beside its mark; each is a pair of texts around it. All but the first are no messages of
# kombu's, and a stock consumer would not survive them.
SHAPES = (
    "kombu",
    '{{"delivery_count":2,"body":"{mark}","properties":{{"priority":{priority}}},"headers":{{"id":"same"}}}}',
    '{{"delivery_count":3,"body":"{mark}","properties":{{"priority":{priority}}}}}',
    ' {{ "delivery_count" : 1 , "body":"{mark}","properties":{{"priority":{priority}}}}}',
    '{{ "delivery_count": 2, "requeue_count" : 1 , "body":"{mark}","properties":{{"priority":{priority}}}}}',
    '{{"delivery_count":1,"requeue_count":1.5,"body":"{mark}","properties":{{"priority":{priority}}}}}',
    '{{"delivery_count":1.5,"body":"{mark}","properties":{{"priority":{priority}}}}}',
    '{{"body":"{mark}","f":1e400,"g":0.1000000000000000055,"e":{{}},"l":[],"properties":{{"priority":{priority}}}}}',
    '{{"body":"{mark} ,\\"\\",\\"x\\"]","properties":{{"priority":{priority}}}}}',
    '{mark},"","x"]',
    '[{mark}\x00"\\',
    "",
)


@dataclass(frozen=True)
class Draft:
    """What a producer is going to publish, and how often it has to try."""

    queue: str
    priority: int
    shape: str
    exchange: str
    producer: int
    times: int

    def text(self, mark: str) -> bytes:
        """The message."""
        if self.shape == "kombu":
            return json.dumps(kombu_message(mark, self.queue, self.priority, self.exchange)).encode()
        return self.shape.format(mark=mark, priority=self.priority).encode()


# The queues of a claim: one or more, in any order.
QUEUE_LISTS = st.permutations(QUEUES).flatmap(lambda queues: st.integers(1, len(queues)).map(lambda of: queues[:of]))
DRAFTS = st.builds(
    Draft,
    queue=st.sampled_from(QUEUES),
    priority=st.sampled_from([0, 0, 0, 2, 3, 8, 9]),
    shape=st.sampled_from(["kombu"] * 6 + list(SHAPES)),
    exchange=st.sampled_from(["", "bound", "unbound"]),
    producer=st.integers(0, PRODUCERS - 1),
    times=st.integers(1, 2),
)


@dataclass(eq=False)
class Message:
    """What the model knows of a message; where it is, the model's collections say."""

    number: int
    raw: bytes
    queue: str
    step: int

    @property
    def list(self) -> str:
        return self.queue if self.step == 0 else f"{self.queue}{keys.PRIORITY_SEPARATOR}{self.step}"

    @property
    def counts(self) -> tuple[int, int]:
        """How often it has been started, and requeued by its task."""
        return read_counts(self.raw)

    def add_counts(self, starts: int = 1, requeues: int = 0) -> None:
        """Count more starts or requeues, or only mark that a process had it."""
        self.raw = add_counts(self.raw, starts, requeues)

    @property
    def record(self) -> bytes:
        """Its record in `unacked`, as JSON's own rules write the name of a queue."""
        name = re.sub(r'["\\\x00-\x1f]', lambda found: f"\\u{ord(found[0]):04x}", self.queue)
        return b'[%s,"","%s"]' % (self.raw, name.encode())


class LeasesWithReplies(Leases):
    """Leases whose marks get a reply: a test has to know when they are there."""

    def mark_started(self, tag: str, acks: Sequence[str] = ()) -> None:
        self._client.sadd(keys.UNACKED_STARTED, tag)


@dataclass(eq=False)
class Process:
    """A process that consumes."""

    name: int
    deliveries: UnackedDeliveries = field(repr=False)
    # Its thread is not started: the test calls it.
    manager: LeaseManager
    claims: ClaimIds
    # What it has claimed and not ended, and whether that has started.
    claimed: dict[str, bool] = field(default_factory=dict)
    # Those whose lease has ended while it stood still.
    frozen: set[str] = field(default_factory=set)
    # The updates that its lease manager has still to send, by kind.
    pending: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, tag: str) -> None:
        """Forget a delivery."""
        self.claimed.pop(tag, None)
        self.frozen.discard(tag)


@dataclass(eq=False)
class Stock:
    """A message that a stock consumer has taken."""

    message: Message
    handle: Any
    record: bytes
    dead: bool = False


class Deliveries(RuleBasedStateMachine):
    """Producers, processes and stock consumers on one Redis."""

    # redis-py's types say str or bytes of everything.
    client: Any
    stock: Any
    publish_script = scripts.PUBLISH

    def begin(self) -> None:
        self.client.flushall()
        self.numbers, self.parked, self.moments = count(1), count(1), count()
        self.unfinished: dict[int, Message] = {}
        # Where the messages are. A list ends with what is taken next.
        self.lists: dict[str, list[Message]] = {}
        self.unacked: dict[str, Message] = {}
        self.ended: dict[str, float] = {}
        self.started: set[str] = set()
        self.stocks: dict[str, Stock] = {}
        self.scheduled: dict[bytes, tuple[float, Message]] = {}
        self.dead: dict[int, tuple[Message, str, bytes, int]] = {}
        # Dead letters whose task does not say FAILURE yet, and those of them that a process has taken to report them.
        self.unreported: set[int] = set()
        self.reporting: set[int] = set()
        self.tries: dict[int, tuple[list[Any], list[Any]]] = {}
        self.names = count(1)
        self.processes = [self._process(number) for number in range(PROCESSES)]

    def _process(self, number: int) -> Process:
        deliveries = UnackedDeliveries(RULES, LeasesWithReplies(self.client, RULES.lease))
        manager = LeaseManager(deliveries, self.client, lambda _: None)
        claims = ClaimIds()
        # Of what is due at the same moment the names decide: an example that is tried again has to have the same.
        claims._prefix = f"{next(self.names):016x}"
        return Process(number, deliveries, manager, claims)

    # Choices.

    def _pick(self, data: st.DataObject, of: list[T], what: str) -> T:
        return data.draw(st.sampled_from(of), label=what)

    def _some_process(self, data: st.DataObject) -> Process:
        return self._pick(data, [process for process in self.processes if process.claimed], "process")

    def _any_claimed(self) -> bool:
        return any(process.claimed for process in self.processes)

    def _some_tags(self, data: st.DataObject, process: Process, unstarted: bool = False) -> list[str]:
        """Some of what it has claimed and not postponed: that is only requeued, when its channel closes."""
        postponed = {tag for tag, _ in process.pending["postpone"]}
        tags = [tag for tag, started in process.claimed.items() if tag not in postponed and not (unstarted and started)]
        some = st.lists(st.sampled_from(tags), min_size=1, max_size=8, unique=True) if tags else st.just([])
        return data.draw(some, label="tags")

    # Publishing.

    @initialize(batch=st.lists(DRAFTS, min_size=5, max_size=15))
    def publish_the_first(self, batch: list[Draft]) -> None:
        """So that there is something to begin with."""
        self.begin()
        self.publish(batch)

    @rule(batch=st.lists(DRAFTS, min_size=1, max_size=3))
    def publish(self, batch: list[Draft]) -> None:
        """Messages, some of them sent again because the answer was lost."""
        for draft in batch:
            self._publish(draft)

    def _publish(self, draft: Draft) -> None:
        number = next(self.numbers)
        raw = draft.text(f"<message {number}>")
        if not raw and any(one.raw == b"" for one in self.unfinished.values()):
            # An empty message bears no mark; one at a time is enough.
            return
        step = max(step for step in keys.PRIORITY_STEPS if step <= draft.priority) if b'"priority"' in raw else 0
        message = self.unfinished[number] = Message(number, raw, draft.queue, step)
        if draft.exchange == "bound":
            binding = keys.PRIORITY_SEPARATOR.join((draft.queue, "", draft.queue))
            self.client.sadd(keys.BINDINGS + draft.exchange, binding)
        # A mark for each thread and list, as the channel makes it.
        written = [message.list, f"{keys.PUBLISHED}{draft.producer}:{message.list}"]
        self.tries[draft.producer] = (written, [raw, f"tag-{number}", 3600])
        answers = [self.publish_script(self.client, *self.tries[draft.producer]) for _ in range(draft.times)]
        assert answers == [1, 0][: draft.times]
        self.lists.setdefault(message.list, []).insert(0, message)

    @precondition(lambda self: self.tries)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """A producer tries its last message again, however late and whatever has become of it."""
        assert self.publish_script(self.client, *self._pick(data, list(self.tries.values()), "producer's last")) == 0

    # Claiming.

    @precondition(lambda self: any(self.lists.values()))
    @rule(data=st.data(), queues=QUEUE_LISTS, credit=st.integers(1, 6), starts=st.sampled_from([0, 0, 1, 2, 6]))
    def claim(self, data: st.DataObject, queues: list[str], credit: int, starts: int) -> None:
        """A process takes messages, and begins with some of them."""
        process = self._pick(data, self.processes, "process")
        asked, answer, expected = self._ask(process, queues, credit)
        process.deliveries.commit_acks(asked.acks)
        found = parse_reply(asked, answer)
        process.deliveries.add([one.tag for one in found], 1, asked.since)
        assert [(one.queue, one.message) for one in found] == [(one.queue, one.raw) for one in expected]
        process.claimed |= {one.tag: False for one in found}
        for one in found[:starts]:
            self._start(process, one.tag)

    @precondition(lambda self: any(self.lists.values()))
    @rule(data=st.data(), queues=QUEUE_LISTS, credit=st.integers(1, 6))
    def lose_the_answer_to_a_claim(self, data: st.DataObject, queues: list[str], credit: int) -> None:
        process = self._pick(data, self.processes, "process")
        asked, _, _ = self._ask(process, queues, credit)
        process.deliveries.rollback_acks(asked.acks)
        process.deliveries.requeue_claim(asked.id, asked.credit)
        process.pending["ack"][:0] = asked.acks
        process.pending["requeue"] += [f"{asked.id}:{number}" for number in range(1, credit + 1)]

    def _ask(self, process: Process, queues: list[str], credit: int) -> tuple[Claim, list[Any], list[Message]]:
        asked = Claim(process.claims.next(), credit, tuple(queues), process.deliveries.take_acks(), clock())
        lists = [keys.get_lists(queue)[step] for step in range(len(keys.PRIORITY_STEPS)) for queue in queues]
        answer = scripts.CLAIM(self.client, *claim_command(asked, lists, RULES.lease))
        assert asked.acks == process.pending.pop("ack", [])
        for tag in asked.acks:
            self._finish(tag)
        expected = list(self._next(queues, credit))
        for number, message in enumerate(expected, 1):
            self.unacked[f"{asked.id}:{number}"] = message
        return asked, answer, expected

    def _next(self, queues: list[str], credit: int) -> Iterator[Message]:
        """What a claim takes: the most urgent first (0 with kombu on Redis), queue after queue, the oldest of each."""
        for step in range(len(keys.PRIORITY_STEPS)):
            lists = [self.lists.get(keys.get_lists(queue)[step], []) for queue in queues]
            while any(lists):
                for waiting in lists:
                    if waiting and credit:
                        credit -= 1
                        yield waiting.pop()
                if not credit:
                    return

    # What becomes of deliveries.

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        process = self._some_process(data)
        for tag in self._some_tags(data, process):
            self._start(process, tag)

    def _start(self, process: Process, tag: str) -> None:
        lost = tag not in self.unacked
        if tag in process.frozen:
            # It renews first whatever has a lease that has run out by its own clock.
            process.deliveries._deliveries[tag].until = clock() - 1
        elif lost:
            # It does not know yet; the next renewal says so.
            return
        ours = process.deliveries.hand_to_pool(tag) and process.deliveries.start(tag)
        assert ours == (not lost)
        process.frozen.discard(tag)
        if lost:
            del process.claimed[tag]
            return
        process.claimed[tag] = True
        self.started.add(tag)
        self.ended.pop(tag, None)

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data(), sent=MOSTLY)
    def end(self, data: st.DataObject, sent: bool) -> None:
        """A process has run tasks, or will not run them; or a child has died over one, or it asks to be run later."""
        process = self._some_process(data)
        for tag in self._some_tags(data, process):
            way = self._pick(data, [*ENDS, "crash", "requeue later"], "way")
            ENDS[way](process.deliveries, tag)
            process.drop(tag)
            process.pending[way].append(tag)
            # A second end of the same delivery changes nothing.
            process.deliveries.ack(tag)
            process.deliveries.record_crash(tag, "once more")
        if sent:
            self._send(process)

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data(), seconds=st.sampled_from([LONG_AGO, -LONG_AGO]), sent=MOSTLY)
    def postpone(self, data: st.DataObject, seconds: float, sent: bool) -> None:
        """A process has claimed what is due tomorrow; or what was due yesterday, which the next sweep requeues."""
        process = self._some_process(data)
        for tag in self._some_tags(data, process, unstarted=True):
            due = sweeper.unix_time() + seconds + next(self.moments)
            process.deliveries.postpone(tag, due, TASK)
            process.pending["postpone"].append((tag, due))
        if sent:
            self._send(process)

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data())
    def close_channel(self, data: st.DataObject) -> None:
        """What the pool does not have is requeued, also what is about to be postponed."""
        process = self._some_process(data)
        process.deliveries.requeue_channel(1)
        tags = [tag for tag, started in process.claimed.items() if not started]
        for tag in tags:
            process.drop(tag)
        process.pending["requeue"] += tags
        self._send(process)

    @rule(answered=st.booleans())
    def send_updates(self, answered: bool) -> None:
        """All lease managers send their updates; without a reply they send all of them again."""
        for process in self.processes:
            self._send(process, 1 if answered else 2)

    def _send(self, process: Process, times: int = 1) -> None:
        updates = process.deliveries.take_pending()
        for _ in range(times if updates else 0):
            process.manager._send(replace(updates))
        self._apply(process.pending)
        for tag, _ in process.pending["postpone"]:
            process.drop(tag)
        process.pending.clear()

    def _apply(self, pending: defaultdict[str, list[Any]]) -> None:
        """Do in the model what a lease manager has sent."""
        for tag in pending["ack"]:
            self._finish(tag)
        for tag in reversed(pending["requeue"]):
            if message := self._take(tag):
                self._requeue(message)
        ends: dict[str, Callable[[Message, str], object]]
        ends = {"crash": self._crash, "requeue later": self._requeue_later, "reject": self._reject}
        for way, end in ends.items():
            for tag in pending[way]:
                if message := self._take(tag):
                    end(message, tag)
        for tag, due in pending["postpone"]:
            if message := self._take(tag):
                self.scheduled[self._free_name(tag)] = (due, message)

    def _free_name(self, tag: str) -> bytes:
        return next(name for name in (*keys.get_scheduled_fields(TASK), tag.encode()) if name not in self.scheduled)

    # Leases.

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """A process renews its leases, and learns which it has lost."""
        process = self._some_process(data)
        process.deliveries.renew()
        process.frozen.clear()
        # Also of what has ended, and has still to be counted or kept: without a lease it would run again.
        for way in ("crash", "requeue later", "reject"):
            for tag in process.pending[way]:
                self.ended.pop(tag, None)
        for tag in list(process.claimed):
            self.ended.pop(tag, None)
            if tag not in self.unacked:
                process.drop(tag)

    @precondition(lambda self: self._any_claimed())
    @rule(data=st.data(), swept=st.booleans())
    def freeze(self, data: st.DataObject, swept: bool) -> None:
        """A process stands still for longer than its leases."""
        process = self._some_process(data)
        process.frozen |= process.claimed.keys()
        self._end_leases([tag for tag in process.claimed if tag in self.unacked])
        if swept:
            self.sweep(resting=False)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), swept=st.booleans())
    def die(self, data: st.DataObject, swept: bool) -> None:
        """A process is killed, and with it the updates that it has not sent; another one is started in its place."""
        process = self._pick(data, self.processes, "process")
        process.pending["postpone"] = [tag for tag, _ in process.pending["postpone"]]
        tags = {*process.claimed}.union(*process.pending.values())
        self._end_leases(sorted(tags & self.unacked.keys()))
        self.processes[process.name] = self._process(process.name)
        if swept:
            self.sweep(resting=False)

    def _end_leases(self, tags: list[str]) -> None:
        for tag in tags:
            # Each at a time of its own, so that the order in which they are swept is known.
            self.ended[tag] = self._now() - LONG_AGO + next(self.moments)
            self.client.zadd(keys.UNACKED_LEASES, {tag: self.ended[tag]}, xx=True)
            self.client.zadd(keys.UNACKED_INDEX, {tag: self.ended[tag]}, xx=True)

    @rule(resting=st.sampled_from([False, False, True]), turn=st.booleans())
    def sweep(self, resting: bool, turn: bool = True) -> None:
        """A process sweeps. `resting`: after an outage, when no lease is taken. `turn`: the next suspect may start."""
        later = self._now() + LONG_AGO
        self.client.hset(
            keys.SWEEPS, mapping={"last": self._now(), "rest": later if resting else 0, "turn": 0 if turn else later}
        )
        found = sweeper.sweep(self.client, RULES)
        parked: list[int] = []
        suspects: dict[str, Message] = {}
        taken = [] if resting else sorted(self.ended, key=self.ended.__getitem__, reverse=True)
        for tag in taken:
            started = tag in self.started
            message = self._take(tag)
            assert message, f"the lease of {tag} has ended, and it is not unacknowledged"
            if not started:
                message.add_counts(0)
                self._requeue(message)
            elif RULES.max_deliveries - 2 <= message.counts[0] < RULES.max_deliveries:
                suspects[tag] = message
            else:
                parked += self._crash(message)
        due = [field for field, (when, _) in self.scheduled.items() if when < self._now()]
        self._take_turns(suspects, turn)
        for field_ in sorted(due, key=lambda one: self.scheduled[one][0], reverse=True):
            self._requeue(self.scheduled.pop(field_)[1])
        overdue = [] if resting else [tag for tag, one in self.stocks.items() if one.dead]
        assert (found.requeued, found.promoted) == (len(taken), len(due))
        assert found.dead_letters == parked
        assert sorted(found.unreported) == sorted(self.unreported)
        assert found.stock == overdue
        assert sweeper.requeue_overdue(self.client, found.stock, keys.PRIORITY_STEPS) == len(overdue)
        for tag in overdue:
            self._restored(self.stocks.pop(tag))

    def _take_turns(self, suspects: dict[str, Message], turn: bool) -> None:
        """Of tasks with two starts left, or one, one is requeued if it may start; the others are scheduled.

        Redis chooses by chance which, so the model reads that in Redis, and nothing else.
        """
        for message in suspects.values():
            message.add_counts()
        new: dict[bytes, float] = dict(self.client.zrange(keys.SCHEDULED, 0, -1, withscores=True))
        new = {name: due for name, due in new.items() if name not in self.scheduled}
        records = {name: self.client.hget(keys.SCHEDULED_MESSAGES, name) for name in new}
        at_once = 0
        for tag, message in suspects.items():
            names = [name for name, record in records.items() if record == message.record]
            if not names:
                self._requeue(message)
                at_once += 1
                continue
            [name] = names
            found = re.search(rb'"id": ?"([^"]*)"', message.raw)
            fields = keys.get_scheduled_fields(found[1].decode()) if found else ()
            taken = [one for one in fields if one in self.scheduled or one in new]
            assert name in fields[: len(taken)] or (name == tag.encode() and len(taken) == len(fields))
            assert 0 < new.pop(name) - self._now() < LONG_AGO
            self.scheduled[name] = (self._fix(name, message), message)
        assert not new
        assert at_once == (1 if suspects and turn else 0)

    # Commands of operators.

    def _some_letters(self, data: st.DataObject) -> list[int]:
        """Ids of dead letters, and one of none."""
        return data.draw(st.lists(st.sampled_from([*self.dead, 0]), min_size=1, unique=True), label="letters")

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        numbers = self._some_letters(data)
        replayed = replay_letters(self.client, *numbers)
        assert replayed == [number for number in numbers if number]
        for number in replayed:
            message, *_ = self.dead.pop(number)
            message.raw = drop_counts(message.raw)
            self.lists.setdefault(message.list, []).insert(0, message)
            self._forget_report(number)

    @precondition(lambda self: self.dead)
    @rule(data=st.data(), dies=st.booleans())
    def report(self, data: st.DataObject, dies: bool) -> None:
        """A process takes dead letters to report the failure of their tasks, and does; or dies before."""
        numbers = self._some_letters(data)
        taken = scripts.TAKE_UNREPORTED(self.client, LETTERS[1:], [keys.DEAD_LETTER, 3600, *numbers])
        mine = [number for number in numbers if number in self.unreported - self.reporting]
        assert [(int(number), raw) for number, raw in zip(taken[::4], taken[1::4], strict=True)] == [
            (number, self.dead[number][2]) for number in mine
        ]
        self.reporting |= set(mine)
        for number in mine if not dies else []:
            self.client.srem(keys.DEAD_LETTERS_UNTOLD, number)
            self._forget_report(number)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def purge_letters(self, data: st.DataObject) -> None:
        numbers = self._some_letters(data)
        reported = [number for number in numbers if number in self.dead.keys() - self.unreported]
        assert scripts.PURGE_LETTERS(self.client, LETTERS, [keys.DEAD_LETTER, *numbers]) == len(reported)
        for number in reported:
            del self.unfinished[self.dead.pop(number)[0].number]

    def _forget_report(self, number: int) -> None:
        self.unreported.discard(number)
        self.reporting.discard(number)

    def _delete_scheduled(self, names: list[bytes]) -> None:
        for name in names:
            del self.unfinished[self.scheduled.pop(name)[1].number]

    @precondition(lambda self: self.scheduled)
    @rule()
    def revoke(self) -> None:
        """All copies of a task that wait for their time, however many there were before."""
        records = scheduled.find_records(self.client, [TASK])
        named = [name for name in keys.get_scheduled_fields(TASK) if name in self.scheduled]
        assert {name: messages.extract_message(record) for name, record in records.items()} == {
            name: self.scheduled[name][1].raw for name in named
        }
        assert scheduled.delete(self.client, list(keys.get_scheduled_fields(TASK))) == set(named)
        self._delete_scheduled(named)

    @precondition(lambda self: self.scheduled)
    @rule(queue=st.sampled_from(QUEUES))
    def purge_scheduled(self, queue: str) -> None:
        named = [name for name, (_, message) in self.scheduled.items() if message.queue == queue]
        assert [one.message for one in scheduled.list_next(self.client, [queue])] == [
            message.raw for _, message in sorted((self.scheduled[name] for name in named), key=lambda one: one[0])
        ]
        assert scheduled.purge(self.client, queue) == (len(named), set())
        self._delete_scheduled(named)

    @precondition(lambda self: self.scheduled or self.ended)
    @rule()
    def to_plain(self) -> None:
        """What only Stalk would requeue is requeued for stock workers, except what is under a lease."""
        waiting = sorted(self.scheduled.values(), key=lambda one: one[0])
        ended = sorted(self.ended, key=self.ended.__getitem__, reverse=True)
        moved = scheduled.to_plain(self.client)
        assert (moved.scheduled, moved.requeued) == (len(waiting), len(ended))
        for _, message in waiting:
            self.lists.setdefault(message.list, []).insert(0, message)
        self.scheduled.clear()
        for tag in ended:
            started, found = tag in self.started, self._take(tag)
            assert found
            if started:
                found.add_counts()
            self._requeue(found)
        assert moved.leased == len(self.unacked)

    # Stock consumers.

    @rule(queue=st.sampled_from(QUEUES))
    def stock_takes(self, queue: str) -> None:
        """kombu's own consumer takes a message, if it is one that it can read."""
        waiting = [self.lists[name] for name in keys.get_lists(queue) if self.lists.get(name)]
        if not waiting or not is_kombus(waiting[0][-1].raw):
            return
        message = waiting[0].pop()
        handle = self.stock.basic_get(queue)
        record: Any = self.client.hget(keys.UNACKED, handle.delivery_tag)
        assert json.loads(record)[0] == json.loads(message.raw)
        self.stocks[handle.delivery_tag] = Stock(message, handle, record)

    @precondition(lambda self: any(not one.dead for one in self.stocks.values()))
    @rule(data=st.data(), dies=st.booleans())
    def stock_ends(self, data: st.DataObject, dies: bool) -> None:
        """It acknowledges its message, or dies and its visibility timeout passes."""
        tag = self._pick(data, [tag for tag, one in self.stocks.items() if not one.dead], "tag")
        if dies:
            # Now it is the last one; an older record of the same message would not be there any more.
            self.stocks[tag].dead = True
            self.stocks[tag] = self.stocks.pop(tag)
            self.client.zadd(keys.UNACKED_INDEX, {tag: self._now() - LONG_AGO + next(self.moments)})
        else:
            one = self.stocks.pop(tag)
            one.handle.ack()
            del self.unfinished[one.message.number]

    def _restored(self, stock: Stock) -> None:
        message = stock.message
        payload = json.loads(stock.record)[0]
        payload["headers"]["redelivered"] = True
        payload["properties"]["delivery_info"]["redelivered"] = True
        message.raw = json.dumps(payload).encode()
        self._requeue(message)

    # Where messages go, in the model.

    def _now(self) -> float:
        seconds, microseconds = self.client.time()
        return float(seconds) + float(microseconds) / 1e6

    def _take(self, tag: str) -> Message | None:
        """Take an unacknowledged message out of its collections; None when another process has had it requeued."""
        self.ended.pop(tag, None)
        self.started.discard(tag)
        return self.unacked.pop(tag, None)

    def _finish(self, tag: str) -> None:
        if message := self._take(tag):
            del self.unfinished[message.number]

    def _requeue(self, message: Message) -> None:
        self.lists.setdefault(message.list, []).append(message)

    def _crash(self, message: Message, _: str = "") -> list[int]:
        if message.counts[0] >= RULES.max_deliveries:
            return [self._park(message, "crashed")]
        message.add_counts()
        self._requeue(message)
        return []

    def _reject(self, message: Message, _: str) -> None:
        self._park(message, UNKNOWN_TASK)

    def _requeue_later(self, message: Message, tag: str) -> None:
        _, before = message.counts
        if before >= RULES.max_requeues:
            self._park(message, "requeued")
            return
        message.add_counts(0, 1)
        name = self._free_name(tag)
        waits = self.client.zscore(keys.SCHEDULED, name) - self._now()
        assert 0 < 0.1 * 2**before - waits < LONG_AGO
        self.scheduled[name] = (self._fix(name, message), message)

    def _fix(self, name: bytes, message: Message) -> float:
        """Let a message that would be due soon be due yesterday or tomorrow; return when."""
        due = self._now() + (LONG_AGO if message.number % 2 else -LONG_AGO) + next(self.moments)
        self.client.zadd(keys.SCHEDULED, {name: due}, xx=True)
        return due

    def _park(self, message: Message, reason: str) -> int:
        number = next(self.parked)
        self.unreported.add(number)
        self.dead[number] = (message, reason, message.raw, sum(message.counts))
        return number

    # What has to be true after each step.

    @invariant()
    def redis_has_what_the_model_says(self) -> None:
        found = self._read()
        unacked = {tag.encode(): one.record for tag, one in self.unacked.items()}
        of_stock = {tag.encode(): one.record for tag, one in self.stocks.items()}
        assert found == {
            "unacked": unacked | of_stock,
            "index": unacked.keys() | of_stock.keys(),
            "leases": unacked.keys(),
            "started": {tag.encode() for tag in self.started},
            "lists": {name: [one.raw for one in messages] for name, messages in self.lists.items() if messages},
            "scheduled": {name: one.record for name, (_, one) in self.scheduled.items()},
            "dues": {name: pytest.approx(due, abs=0.001) for name, (due, _) in self.scheduled.items()},
            "unreported": self.unreported,
            "letters": {
                number: [reason.encode(), raw, message.queue.encode(), b"%d" % deliveries]
                for number, (message, reason, raw, deliveries) in self.dead.items()
            },
        }
        self._check_places(found)

    def _check_places(self, found: dict[str, Any]) -> None:
        """Each unfinished message is in one place, by its mark, in what was read and without the model."""
        places = [raw for messages in found["lists"].values() for raw in messages]
        places += [*found["unacked"].values(), *found["scheduled"].values()]
        places += [letter[1] for letter in found["letters"].values()]
        marks = Counter(int(number) for raw in places for number in MARK.findall(raw)[:1])
        assert marks == Counter(one.number for one in self.unfinished.values() if b"<message" in one.raw)

    @invariant()
    def processes_have_what_the_model_says(self) -> None:
        for process in self.processes:
            assert sorted(process.deliveries._deliveries) == sorted(process.claimed)
            assert process.deliveries.is_idle == (not any(process.pending.values()))

    def _read(self) -> dict[str, Any]:
        """All that is in Redis."""
        ask = self.client
        lists = {name: ask.lrange(name, 0, -1) for queue in QUEUES for name in keys.get_lists(queue)}
        letters = [int(number) for number in ask.zrange(keys.DEAD_LETTERS, 0, -1)]
        fields = ("reason", "message", "queue", "deliveries")
        return {
            "unacked": ask.hgetall(keys.UNACKED),
            "index": set(ask.zrange(keys.UNACKED_INDEX, 0, -1)),
            "leases": set(ask.zrange(keys.UNACKED_LEASES, 0, -1)),
            "started": ask.smembers(keys.UNACKED_STARTED),
            "lists": {name: found for name, found in lists.items() if found},
            "scheduled": ask.hgetall(keys.SCHEDULED_MESSAGES),
            "dues": dict(ask.zrange(keys.SCHEDULED, 0, -1, withscores=True)),
            "unreported": set(map(int, ask.smembers(keys.DEAD_LETTERS_UNTOLD))),
            "letters": {number: ask.hmget(f"{keys.DEAD_LETTER}{number}", *fields) for number in letters},
        }

    def teardown(self) -> None:
        if "processes" in self.__dict__:
            note(f"{self._read()}\n{keys.SWEEPS}: {self.client.hgetall(keys.SWEEPS)}\n{self.processes}")


class DeliveriesOfAFullRedis(Deliveries):
    """The same on a Redis that has only its reserve left; a stock consumer would lose what it takes."""

    server: RedisServer
    # What a worker's task publishes.
    publish_script = scripts.PUBLISH.with_headroom

    def begin(self) -> None:
        self.server.make_room()
        super().begin()
        # Beside it no example counts: none gets out of the reserve's first half, in either direction.
        self.client.setrange("filler", FILLER_BYTES, "x")
        self.server.fill(1.06)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            redis.Redis(connection_pool=self.client.connection_pool).set("more", "than there is room for")

    def stock_takes(self, queue: str = "") -> None:
        """Nothing."""


def kombu_message(mark: str, queue: str, priority: int, exchange: str) -> dict[str, Any]:
    """A message as kombu writes it. The routing key is the queue's name, as everywhere in Celery."""
    return {
        "body": mark,
        "content-encoding": "utf-8",
        "content-type": "text/plain",
        "headers": {"float": 1e-7, "empty": {}, "text": "ü", "id": f"id of {mark}"},
        "properties": {
            "delivery_tag": f"tag of {mark}",
            "delivery_info": {"exchange": exchange, "routing_key": queue},
            "priority": priority,
        },
    }


def is_kombus(raw: bytes) -> bool:
    """Whether kombu could have published it."""
    try:
        return "delivery_info" in json.loads(raw)["properties"]
    except (ValueError, TypeError, KeyError):
        return False


@pytest.fixture(autouse=True)
def same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chance decide the same each time."""
    assert SAME_CHANCE != scripts.SWEEP, "lua/sweep.lua sets no random seed any more"
    monkeypatch.setattr(scripts, "SWEEP", SAME_CHANCE)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_message_is_never_in_zero_places_or_in_two(server: RedisServer, examples: int) -> None:
    assert keys.get_scheduled_fields(TASK)[0] == b"half: \\ud800"
    # The leases of each process take a connection out of the pool for good, although here none of them ever connects.
    Deliveries.client = redis.Redis(port=server.port, socket_timeout=10, max_connections=1_000_000)
    carry_out(Deliveries, server, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_full_redis_can_be_emptied(server: RedisServer, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # For the commands of the test itself.
    monkeypatch.setattr(RetryState, "in_worker", True)
    DeliveriesOfAFullRedis.client = headroom.Client(port=server.port, socket_timeout=10, max_connections=1_000_000)
    DeliveriesOfAFullRedis.server = server
    try:
        carry_out(DeliveriesOfAFullRedis, server, examples)
    finally:
        server.make_room()


def carry_out(machine: type[Deliveries], server: RedisServer, examples: int) -> None:
    """Try so many examples."""
    with kombu.Connection(server.url()) as connection:
        channel = connection.channel()
        # What it has taken stays with it, as after a SIGKILL.
        channel.do_restore = False
        machine.stock = channel
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEP_COUNT,
                deadline=None,
                print_blob=True,
                phases=(Phase.explicit, Phase.reuse, Phase.generate),
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
