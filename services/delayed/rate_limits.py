"""Rate limits: a task over its rate waits in Redis until its token comes, and keeps nobody else from the node.

Celery keeps such tasks in the worker, where they take up its prefetch count (celery 5.7).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, NamedTuple

from redis import Redis

from services.broker import scripts
from services.broker.keys import PRIORITY_STEPS, RATE_LIMIT
from services.delayed.scheduled import KEYS, MOVED_AT_ONCE

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
    """Bring back to their queues tasks that wait for tokens of other rates than these, or without this node.

    Returns how many of each task. Costs a round trip where nothing waits. Raises redis.exceptions.RedisError.
    """
    with client.pipeline(transaction=False) as pipe:
        for task in rates:
            pipe.hgetall(_key(task))
        found = zip(rates.items(), pipe.execute(), strict=True)
    return {task: bring_back(client, task) for (task, rate), nodes in found if _is_outdated(rate, nodes)}


def _is_outdated(rate: Rate | None, nodes: dict[bytes, bytes]) -> bool:
    """Whether tasks wait for tokens that are not those of this rate; `nodes` as in lua/token.lua."""
    promised = {node: value.split() for node, value in nodes.items() if float(value.split()[0]) > time()}
    if not promised or rate is None:
        return bool(promised)
    # A node that joins takes a part of what waits; what waits for one that was killed starts at the rates of others.
    joins = bool(rate.node) and rate.node.encode() not in nodes
    interval, shared = rate.interval.encode(), not rate.node
    return joins or any(value[-1] != interval or shared is bool(node) for node, value in promised.items())


def leave(client: Redis, rates: Iterable[Rate]) -> None:
    """Bring back what waits for a token of a node that stops: another one takes new ones, at a rate of its own.

    Raises redis.exceptions.RedisError.
    """
    end = monotonic() + LEAVING_SECONDS
    for rate in rates:
        if rate.node and client.hexists(_key(rate.task), rate.node):
            bring_back(client, rate.task, rate.node, end)


def bring_back(client: Redis, task: str, gone: str = "", end: float = math.inf) -> int:
    """Bring back to its queues what waits of a task for its rate: all, or what waits for the node that is `gone`.

    Returns how many. Raises redis.exceptions.RedisError.
    """
    offset = released = 0
    while monotonic() < end:
        arguments = [scripts.as_json(PRIORITY_STEPS), task, gone, offset, MOVED_AT_ONCE]
        looked, back = scripts.REQUEUE_RATE_LIMITED(client, [*KEYS, _key(task)], arguments)
        released += back
        offset += looked - back
        if looked < MOVED_AT_ONCE:
            break
    return released


def _key(task: str) -> bytes:
    # JSON can spell half a character in a name, which UTF-8 cannot.
    return f"{RATE_LIMIT}{task}".encode(errors="backslashreplace")
