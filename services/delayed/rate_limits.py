"""Rate limits: a task over its rate waits in Redis for its token, and takes no place of the node.

Celery keeps such tasks in the worker, where they use up its prefetch count (celery 5.7).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, NamedTuple, Self

from redis import Redis

from services.broker import scripts
from services.broker.keys import PRIORITY_STEPS, RATE_LIMIT, SCHEDULED_KEYS
from services.delayed.scheduled import BATCH_SIZE

# WORKER_RATE_LIMIT_SCOPE for rates of all nodes together.
SHARED = "shared"
# Unix time for: none.
NEVER = 0.0
# A node that stops has ten seconds to requeue what it holds, and needs some of them for other things; what is not
# requeued by then starts at its token all the same.
STOP_SECONDS = 3.0


class Delay(NamedTuple):
    """Until when a task waits, Unix time, and the token in its message meanwhile; "" for none."""

    due: float
    token: str = ""


@dataclass(frozen=True)
class Rate:
    """How often a task may start: `interval` seconds from one start to the next, in `node` or ("") in all together."""

    task: str
    interval: str
    node: str

    @classmethod
    def per_second(cls, task: str, count: float, node: str) -> Self:
        """So many starts a second. The interval is text, so that it is the same number in every process."""
        return cls(task, f"{1 / count:.9f}", node)

    def take_token(
        self, client: Any, delivery: dict[str, Any], start: int, earliest: float, expires: float
    ) -> Delay | None:
        """Take a token for a delivery. Returns None when it starts now.

        `start`: which start of its message it would be; `earliest` and `expires`: the task's own times, or NEVER.
        Raises redis.exceptions.RedisError.
        """
        waited = self._parse_token(delivery.get("rate_limit_token"), start)
        arguments = [self.node, self.interval, *map(repr, (earliest, expires, waited))]
        due, taken = client.run(scripts.TOKEN, [_key(self.task)], arguments)
        if not due:
            return None
        return Delay(float(due), self._format_token(float(due), start) if taken else "")

    def _format_token(self, due: float, start: int) -> str:
        """The token as it stands in a message; lua/record.lua looks for its brackets, so there are none inside."""
        inner = json.dumps([self.task, self.interval, self.node, due, start])[1:-1]
        return "[" + inner.replace("[", "\\u005b").replace("]", "\\u005d") + "]"

    def _parse_token(self, token: Any, start: int) -> float:
        """When the token is due for which a delivery has waited; NEVER: none, one of another rate, or used already."""
        match token:
            case [self.task, self.interval, str(node), int() | float() as due, int(of)]:
                return float(due) if of == start and bool(node) == bool(self.node) else NEVER
        return NEVER


def requeue_outdated(client: Redis, rates: dict[str, Rate | None]) -> dict[str, int]:
    """Requeue tasks that wait for tokens of other rates than these, or of nodes without this one.

    Returns how many of each task. Costs one round trip where nothing waits. Raises redis.exceptions.RedisError.
    """
    with client.pipeline(transaction=False) as pipe:
        for task in rates:
            pipe.hgetall(_key(task))
        found = zip(rates.items(), pipe.execute(), strict=True)
    return {task: requeue(client, task) for (task, rate), nodes in found if _is_outdated(rate, nodes)}


def _is_outdated(rate: Rate | None, nodes: dict[bytes, bytes]) -> bool:
    """Whether tasks wait for tokens that are not those of this rate; `nodes` as in lua/token.lua."""
    promised = {node: value.split() for node, value in nodes.items() if float(value.split()[0]) > time()}
    if not promised or rate is None:
        return bool(promised)
    # A node that joins takes a part of what waits; what waits for one that was killed starts at the rates of others.
    joins = bool(rate.node) and rate.node.encode() not in nodes
    interval, shared = rate.interval.encode(), not rate.node
    return joins or any(value[-1] != interval or shared is bool(node) for node, value in promised.items())


def requeue_of_stopping_node(client: Redis, rates: Iterable[Rate]) -> None:
    """Requeue what waits for a token of a node that stops: other nodes take new ones, at rates of their own.

    Raises redis.exceptions.RedisError.
    """
    end = monotonic() + STOP_SECONDS
    for rate in rates:
        if rate.node and client.hexists(_key(rate.task), rate.node):
            requeue(client, rate.task, rate.node, end)


def requeue(client: Redis, task: str, node: str = "", end: float = math.inf) -> int:
    """Requeue what waits of a task for a token: of any node, or of `node`; begin no new call after `end` (monotonic).

    Returns how many. Raises redis.exceptions.RedisError.
    """
    offset = requeued = 0
    while monotonic() < end:
        arguments = [scripts.as_json(PRIORITY_STEPS), task, node, offset, BATCH_SIZE]
        looked, moved = scripts.REQUEUE_RATE_LIMITED(client, [*SCHEDULED_KEYS, _key(task)], arguments)
        requeued += moved
        offset += looked - moved
        if looked < BATCH_SIZE:
            break
    return requeued


def _key(task: str) -> bytes:
    # JSON can spell half a character in a name, which UTF-8 cannot.
    return f"{RATE_LIMIT}{task}".encode(errors="backslashreplace")
