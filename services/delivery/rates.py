"""Rate limits: a task over its rate waits in Redis until its token comes, and keeps nobody else from the node.

Celery keeps such tasks in the worker, where they take up its prefetch count (celery 5.7).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

from redis import Redis

from services.delivery import restore, scripts
from services.delivery.scheduled import KEYS, MOVED_AT_ONCE
from services.queues import PRIORITY_STEPS, RATE_LIMIT

# Of rates that all nodes have together.
SHARED = "shared"
# Unix time for: none.
NEVER = 0.0
# A node that stops has ten seconds to hand back what it holds, and needs some of them for other things; what is not
# brought back by then starts at its token all the same.
LEAVING_SECONDS = 3.0


class Turn(NamedTuple):
    """Until when a task waits, Unix time, and what its message says meanwhile."""

    due: float
    token: str


@dataclass(frozen=True)
class Rate:
    """How often a task may start: `interval` seconds from one start to the next, in `node` or ("") in all together."""

    task: str
    interval: str
    node: str

    @classmethod
    def of(cls, task: str, a_second: float, node: str) -> Rate:
        """So many starts a second. The interval is text, so that it is the same number for everybody."""
        return cls(task, f"{1 / a_second:.9f}", node)

    def take(self, client: Any, delivery: dict[str, Any], start: int, earliest: float, expires: float) -> Turn | None:
        """Take a token for a delivery. Returns None when it starts now.

        `start`: which start of its message it would be; `earliest` and `expires`: the task's own times, or NEVER.
        Raises redis.exceptions.RedisError.
        """
        waited = self._waited_for(delivery.get("rate_limit_token"), start)
        arguments = [self.node, self.interval, *map(repr, (earliest, expires, waited))]
        due, taken = client.run(scripts.TOKEN, [_key(self.task)], arguments)
        if not due:
            return None
        return Turn(float(due), self._token(float(due), start) if taken else "")

    def _token(self, due: float, start: int) -> str:
        """What a message says that waits for a token (lua/record.lua looks for the brackets)."""
        inner = json.dumps([self.task, self.interval, self.node, due, start])[1:-1]
        return "[" + inner.replace("[", "\\u005b").replace("]", "\\u005d") + "]"

    def _waited_for(self, token: Any, start: int) -> float:
        """The token for which a delivery has waited, Unix time; NEVER: none, one of another rate, or used up."""
        match token:
            case [self.task, self.interval, str(node), int() | float() as due, int(of)]:
                return float(due) if of == start and bool(node) == bool(self.node) else NEVER
        return NEVER


def settle(client: Redis, rates: dict[str, Rate | None]) -> dict[str, int]:
    """Bring back to their queues what waits for a token of another rate than these; None: there is no limit.

    Returns how many of each task. Costs a round trip where nothing does. Raises redis.exceptions.RedisError.
    """
    with client.pipeline(transaction=False) as pipe:
        for task in rates:
            pipe.hgetall(_key(task))
        promised = pipe.execute()
    found = {}
    for (task, rate), nodes in zip(rates.items(), promised, strict=True):
        others = [node for node, value in nodes.items() if not _is_of(rate, node, value)]
        if others:
            client.hdel(_key(task), *others)
            found[task] = _release(client, task, rate)
    return found


def _is_of(rate: Rate | None, node: bytes, value: bytes) -> bool:
    return rate is not None and value.split()[-1] == rate.interval.encode() and bool(node) == bool(rate.node)


def leave(client: Redis, rates: Iterable[Rate]) -> None:
    """Bring back what waits for a token of a node that stops: another one takes new ones, at a rate of its own.

    Raises redis.exceptions.RedisError.
    """
    end = monotonic() + LEAVING_SECONDS
    for rate in rates:
        if rate.node and (value := client.hget(_key(rate.task), rate.node)):
            # Under the same name it would start again at once.
            client.hset(_key(rate.task), rate.node, b" ".join([b"0", *value.split()[1:]]))
            _release(client, rate.task, None, rate.node, end)


def _release(client: Redis, task: str, rate: Rate | None, gone: str = "", end: float = float("inf")) -> int:
    """Returns how many are back in their queues."""
    interval, scope = (rate.interval, "" if rate.node else SHARED) if rate else ("", "")
    offset = released = 0
    while monotonic() < end:
        arguments = [restore.as_json(PRIORITY_STEPS), task, interval, scope, gone, offset, MOVED_AT_ONCE]
        looked, back = scripts.RELEASE(client, KEYS, arguments)
        released += back
        offset += looked - back
        if looked < MOVED_AT_ONCE:
            break
    return released


def _key(task: str) -> bytes:
    # JSON can spell half a character in a name, which UTF-8 cannot.
    return f"{RATE_LIMIT}{task}".encode(errors="backslashreplace")
