"""Claim: the connection on which a channel asks for messages, and waits for more without asking.

A claim takes what there is. When there is nothing, the connection looks at its lists with EXISTS, and Redis, which
keeps track of what a client has seen (CLIENT TRACKING, for client-side caches), says once that one of them has
changed. So an idle worker sends next to nothing, any of many lists wakes it, and nothing is taken from a list
outside a claim.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from celery.utils.log import get_logger
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

from services.broker import scripts
from services.broker.client import refusal
from services.broker.keys import HELD
from services.broker.retry import passes
from services.delivery.unacked import Holder, clock

logger = get_logger(__name__)

# As many as acknowledgements travel together: a larger batch gains little and keeps others from the work.
MOST = 64
# Large messages come one by one: a reply should not be larger than this, plus one message.
MOST_BYTES = 1_000_000
# Redis tells when there is something; a look now and then finds out that the connection is dead, and what was
# missed. Without tracking, looking is all there is.
LOOK_SECONDS = 5.0
LOOK_UNTRACKED_SECONDS = 0.2
# Redis answers in milliseconds; config/celery.py gives up a socket after the same time.
REPLY_SECONDS = 10.0


@dataclass(frozen=True)
class Claim:
    """A question for messages: at most `credit`, from `queues`, with `acks` on board, sent at `since`."""

    id: str
    credit: int
    queues: tuple[str, ...]
    acks: list[str]
    since: float


class Tag(str):
    """The tag of a delivery that is under a lease. A message that has another one is under none, as a broadcast."""

    __slots__ = ()


@dataclass(frozen=True)
class Claimed:
    """A message and the tag of its delivery."""

    tag: Tag
    queue: str
    message: bytes


class Refused(Exception):
    """Redis answers, and lets nothing be claimed until somebody sees to it: it is full, for instance."""


class Claims:
    """The ids of claims, unique among all processes, also those that are forked later."""

    def __init__(self) -> None:
        self._pid, self._prefix, self._numbers = os.getpid(), uuid.uuid4().hex[:16], count(1)

    def next(self) -> str:
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc]
        return f"{self._prefix}:{next(self._numbers):x}"


def command(claim: Claim, lists: Sequence[str], lease: int) -> tuple[list[Any], list[Any]]:
    """Keys and arguments of lua/claim.lua. `lists`: all queues of the most urgent priority, then of the next."""
    ends = [f',"",{_json_string(queue)}]' for queue in claim.queues]
    arguments = [claim.id, claim.credit, lease, MOST_BYTES, len(claim.queues), *ends, *claim.acks]
    return [*HELD, *lists], arguments


def _json_string(text: str) -> str:
    """As JSON, without a quote or a backslash of its own: the scripts look for the quotes (lua/record.lua)."""
    return '"' + re.sub(r'["\\\x00-\x1f]', lambda found: f"\\u{ord(found[0]):04x}", text) + '"'


def claimed(claim: Claim, answer: list[Any]) -> list[Claimed]:
    """What the script has answered. Raises Refused."""
    refusal, *rest = answer
    found = [
        Claimed(Tag(f"{claim.id}:{number}"), claim.queues[int(queue) - 1], message)
        for number, (queue, message) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1)
    ]
    if refusal and not found:
        raise Refused(refusal.decode())
    return found


class ClaimLine:
    """The dialogue on one connection, which its owner connects, registers with a poller and closes."""

    def __init__(self, holder: Holder, claims: Claims, channel: int) -> None:
        self._holder, self._claims, self._channel = holder, claims, channel
        self._socket: Any = None
        self._tracked = True
        self._expected: deque[str] = deque()
        self._claim: Claim | None = None
        self._lists: list[str] = []
        # Whether other queues are to be asked for than those of the last question.
        self._outdated = False
        # When the last question was sent, and since when it waits for news.
        self._asked_at = self._watching_since = 0.0
        self._not_before = 0.0

    @property
    def outstanding(self) -> int:
        """Credit that a claim under way may use up."""
        return self._claim.credit if self._claim else 0

    @property
    def asking(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._expected)

    @property
    def overdue(self) -> bool:
        """Whether the answer should have been here long ago."""
        return bool(self._expected) and clock() > self._asked_at + REPLY_SECONDS

    @property
    def wants_look(self) -> bool:
        """Whether it has waited long enough to look by itself, or waits for news about other queues than it should."""
        seconds = LOOK_SECONDS if self._tracked else LOOK_UNTRACKED_SECONDS
        return not self._expected and (self._outdated or clock() > self._watching_since + seconds)

    @property
    def patience(self) -> float:
        """Seconds for which somebody may wait without looking after this line."""
        return LOOK_SECONDS if self._tracked and not self.resting else LOOK_UNTRACKED_SECONDS

    @property
    def resting(self) -> bool:
        """Whether Redis has refused a claim just now."""
        return clock() < self._not_before

    def outdate(self) -> None:
        """The queues have changed: ask anew, as soon as nothing is to come."""
        self._outdated = True

    def ask(self, connection: Any, queues: Sequence[str], lists: Sequence[str], credit: int) -> None:
        """Send a claim. Raises redis.exceptions.RedisError."""
        packed = []
        if self._socket is not connection._sock:
            self._socket, self._tracked = connection._sock, True
            self._holder.prepare_marks()
            packed.append(("tracking", ("CLIENT", "TRACKING", "ON", "NOLOOP")))
        acks = self._holder.acks_for_claim()
        self._claim = Claim(self._claims.next(), min(credit, MOST), tuple(queues), acks, clock())
        self._lists, self._outdated = list(lists), False
        keys, arguments = command(self._claim, lists, self._holder.rules.lease)
        packed.append(("claim", ("EVALSHA", scripts.CLAIM.sha, len(keys), *keys, *arguments)))
        self._send(connection, packed)

    def _send(self, connection: Any, packed: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._expected.extend(kind for kind, _ in packed)
        self._asked_at = clock()
        # A health check would wait for its answer here.
        connection.send_packed_command(
            connection.pack_commands([arguments for _, arguments in packed]), check_health=False
        )

    def read(self, connection: Any) -> list[Claimed] | None:
        """Read what has come. None: there is nothing to be had; the line watches, or waits for an answer.

        [] when it is time to ask again. Raises Refused, or redis.exceptions.RedisError, after which the connection
        is no use any more.
        """
        if not self._expected:
            # News about the lists; the parser deals with it.
            connection.read_response(push_request=True)
            return []
        while self._expected:
            found = self._answer(connection, self._expected[0])
            if found is not None:
                return found
            if self._expected and not connection.can_read(0):
                return None
        # The news may have come in the same packet as the last answer.
        if connection.can_read(0):
            return self.read(connection)
        return None

    def _answer(self, connection: Any, kind: str) -> list[Claimed] | None:
        try:
            answer = connection.read_response()
        except ResponseError as error:
            self._error(connection, kind, error)
            return None
        self._expected.popleft()
        if kind == "claim":
            return self._on_claimed(connection, answer)
        if kind == "exists":
            self._watching_since = clock()
            return [] if answer else None
        return None

    def _on_claimed(self, connection: Any, answer: list[Any]) -> list[Claimed] | None:
        claim, self._claim = self._claim, None
        if claim is None:
            raise InvalidResponse("an answer to a claim that was not made")
        self._holder.sent(claim.acks)
        try:
            found = claimed(claim, answer)
        except Refused:
            self._not_before = clock() + LOOK_UNTRACKED_SECONDS
            raise
        if found:
            self._holder.hold([one.tag for one in found], self._channel, claim.since)
            return found
        self._send(connection, [("exists", ("EXISTS", *self._lists))])
        return None

    def _error(self, connection: Any, kind: str, error: ResponseError) -> None:
        self._expected.popleft()
        if kind == "tracking":
            self._tracked = False
            logger.warning(
                "claim: Redis refuses CLIENT TRACKING (%s): an idle worker looks for tasks every %g s instead",
                error,
                LOOK_UNTRACKED_SECONDS,
            )
            return
        if kind == "claim" and isinstance(error, NoScriptError) and self._claim:
            keys, arguments = command(self._claim, self._lists, self._holder.rules.lease)
            self._send(connection, [("claim", ("EVAL", scripts.CLAIM.text, len(keys), *keys, *arguments))])
            return
        # An error inside the script: what it had written before stays under the lease, and goes back.
        self.reset()
        if kind == "claim" and passes(error):
            self._not_before = clock() + LOOK_UNTRACKED_SECONDS
            raise Refused(refusal(error)) from None
        raise error

    def reset(self) -> None:
        """The connection is gone, or about to be: what a claim under way may have taken goes back."""
        claim, self._claim = self._claim, None
        self._expected.clear()
        self._socket = None
        if claim:
            self._holder.unsent(claim.acks)
            self._holder.abandon(claim.id, claim.credit)
