"""Claim: the connection on which a channel takes messages from their lists, and waits for more.

A claim takes what there is. When there is nothing, the connection looks at its lists with EXISTS, and Redis, which
keeps track of what a client has seen (CLIENT TRACKING, for client-side caches), says once that one of them has
changed. So an idle worker sends next to nothing, any of many lists wakes it, and nothing is taken from a list
outside a claim.
"""

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
from services.broker.client import format_error
from services.broker.keys import UNACKED_KEYS
from services.broker.retry import is_temporary
from services.delivery.unacked import UnackedDeliveries, clock

logger = get_logger(__name__)

# As many as acknowledgements are sent together: a larger batch gains little and keeps tasks from other nodes.
MOST = 64
# Large messages come one by one: a reply should not be larger than this, plus one message.
MOST_BYTES = 1_000_000
# Redis says when there is something; a claim now and then finds a dead connection, and what was missed. Without
# tracking, a claim now and then is all there is.
LOOK_SECONDS = 5.0
LOOK_UNTRACKED_SECONDS = 0.2
# Redis replies in milliseconds; config/celery.py gives up a socket after the same time.
REPLY_SECONDS = 10.0


@dataclass(frozen=True)
class Claim:
    """A request for at most `credit` messages from `queues`, sent at `since` together with `acks`."""

    id: str
    credit: int
    queues: tuple[str, ...]
    acks: list[str]
    since: float


class Tag(str):
    """The tag of a delivery that is under a lease. A message that has another one is under none, as a broadcast is."""

    __slots__ = ()


@dataclass(frozen=True)
class ClaimedMessage:
    """A message and the tag of its delivery."""

    tag: Tag
    queue: str
    message: bytes


class Refused(Exception):
    """Redis replies that nothing can be claimed until somebody sees to it: it is full, for instance."""


class ClaimIds:
    """The ids of claims, unique among all processes, also those that are forked later."""

    def __init__(self) -> None:
        self._pid, self._prefix, self._numbers = os.getpid(), uuid.uuid4().hex[:16], count(1)

    def next(self) -> str:
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc]
        return f"{self._prefix}:{next(self._numbers):x}"


def claim_command(claim: Claim, lists: Sequence[str], lease: int) -> tuple[list[Any], list[Any]]:
    """Keys and arguments of lua/claim.lua. `lists`: all queues of the most urgent priority, then of the next."""
    ends = [f',"",{_json_string(queue)}]' for queue in claim.queues]
    arguments = [claim.id, claim.credit, lease, MOST_BYTES, len(claim.queues), *ends, *claim.acks]
    return [*UNACKED_KEYS, *lists], arguments


def _json_string(text: str) -> str:
    """As JSON, without a quote or a backslash of its own: the scripts look for the quotes (lua/record.lua)."""
    return '"' + re.sub(r'["\\\x00-\x1f]', lambda found: f"\\u{ord(found[0]):04x}", text) + '"'


def parse_reply(claim: Claim, reply: list[Any]) -> list[ClaimedMessage]:
    """The messages in a reply of lua/claim.lua. Raises Refused."""
    refusal, *rest = reply
    found = [
        ClaimedMessage(Tag(f"{claim.id}:{number}"), claim.queues[int(queue) - 1], message)
        for number, (queue, message) in enumerate(zip(rest[::2], rest[1::2], strict=True), 1)
    ]
    if refusal and not found:
        raise Refused(refusal.decode())
    return found


class ClaimConnection:
    """The requests and replies on one connection, which its owner connects, registers with a poller and closes."""

    def __init__(self, deliveries: UnackedDeliveries, ids: ClaimIds, channel: int) -> None:
        self._deliveries, self._ids, self._channel = deliveries, ids, channel
        self._socket: Any = None
        self._tracked = True
        self._expected: deque[str] = deque()
        self._claim: Claim | None = None
        self._lists: list[str] = []
        # Whether the queues have changed since the last claim.
        self._outdated = False
        # When the last request was sent, and since when it waits for Redis to say that a list has changed.
        self._asked_at = self._watching_since = 0.0
        self._not_before = 0.0

    @property
    def outstanding(self) -> int:
        """Credit that a claim under way may use up."""
        return self._claim.credit if self._claim else 0

    @property
    def is_awaiting_reply(self) -> bool:
        """Whether a reply is to come."""
        return bool(self._expected)

    @property
    def is_overdue(self) -> bool:
        """Whether a reply should have come long ago."""
        return bool(self._expected) and clock() > self._asked_at + REPLY_SECONDS

    @property
    def is_look_due(self) -> bool:
        """Whether it is time to claim again: it has waited for long enough, or the queues have changed."""
        seconds = LOOK_SECONDS if self._tracked else LOOK_UNTRACKED_SECONDS
        return not self._expected and (self._outdated or clock() > self._watching_since + seconds)

    @property
    def max_wait_seconds(self) -> float:
        """Seconds for which a poller may wait without calling Channel.check_claim."""
        return LOOK_SECONDS if self._tracked and not self.is_paused else LOOK_UNTRACKED_SECONDS

    @property
    def is_paused(self) -> bool:
        """Whether Redis has refused a claim just now."""
        return clock() < self._not_before

    def queues_changed(self) -> None:
        """Claim from the new queues as soon as no reply is to come."""
        self._outdated = True

    def send_claim(self, connection: Any, queues: Sequence[str], lists: Sequence[str], credit: int) -> None:
        """Send a claim. Raises redis.exceptions.RedisError."""
        packed = []
        if self._socket is not connection._sock:
            self._socket, self._tracked = connection._sock, True
            # What a claim brings may start before the lease manager has opened the connection for marks.
            self._deliveries.leases.prepare_marks()
            packed.append(("tracking", ("CLIENT", "TRACKING", "ON", "NOLOOP")))
        acks = self._deliveries.take_acks()
        self._claim = Claim(self._ids.next(), min(credit, MOST), tuple(queues), acks, clock())
        self._lists, self._outdated = list(lists), False
        keys, arguments = claim_command(self._claim, lists, self._deliveries.rules.lease)
        packed.append(("claim", ("EVALSHA", scripts.CLAIM.sha, len(keys), *keys, *arguments)))
        self._send(connection, packed)

    def _send(self, connection: Any, packed: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._expected.extend(kind for kind, _ in packed)
        self._asked_at = clock()
        # A health check would wait for its reply here.
        connection.send_packed_command(
            connection.pack_commands([arguments for _, arguments in packed]), check_health=False
        )

    def read(self, connection: Any) -> list[ClaimedMessage] | None:
        """Read what has come: messages, [] when it is time to claim again, or None while there is nothing.

        Raises Refused, or redis.exceptions.RedisError, after which the connection cannot be used any more.
        """
        if not self._expected:
            # Redis says that a list has changed; the parser deals with it.
            connection.read_response(push_request=True)
            return []
        while self._expected:
            found = self._read_reply(connection, self._expected[0])
            if found is not None:
                return found
            if self._expected and not connection.can_read(0):
                return None
        # It may have come in the same packet as the last reply.
        if connection.can_read(0):
            return self.read(connection)
        return None

    def _read_reply(self, connection: Any, kind: str) -> list[ClaimedMessage] | None:
        try:
            reply = connection.read_response()
        except ResponseError as error:
            self._handle_error(connection, kind, error)
            return None
        self._expected.popleft()
        if kind == "claim":
            return self._read_messages(connection, reply)
        if kind == "exists":
            self._watching_since = clock()
            return [] if reply else None
        return None

    def _read_messages(self, connection: Any, reply: list[Any]) -> list[ClaimedMessage] | None:
        claim, self._claim = self._claim, None
        if claim is None:
            raise InvalidResponse("a reply to a claim that was not made")
        self._deliveries.commit_acks(claim.acks)
        try:
            found = parse_reply(claim, reply)
        except Refused:
            self._not_before = clock() + LOOK_UNTRACKED_SECONDS
            raise
        if found:
            self._deliveries.add([one.tag for one in found], self._channel, claim.since)
            return found
        self._send(connection, [("exists", ("EXISTS", *self._lists))])
        return None

    def _handle_error(self, connection: Any, kind: str, error: ResponseError) -> None:
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
            keys, arguments = claim_command(self._claim, self._lists, self._deliveries.rules.lease)
            self._send(connection, [("claim", ("EVAL", scripts.CLAIM.text, len(keys), *keys, *arguments))])
            return
        # An error inside the script: what it has moved before is under a lease, and is requeued.
        self.reset()
        if kind == "claim" and is_temporary(error):
            self._not_before = clock() + LOOK_UNTRACKED_SECONDS
            raise Refused(format_error(error)) from None
        raise error

    def reset(self) -> None:
        """Requeue what a claim under way may have taken: the connection is gone, or about to be."""
        claim, self._claim = self._claim, None
        self._expected.clear()
        self._socket = None
        if claim:
            self._deliveries.rollback_acks(claim.acks)
            self._deliveries.requeue_claim(claim.id, claim.credit)
