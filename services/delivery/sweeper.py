"""Sweep: requeue messages of dead workers, and put tasks into their queues that are due."""

import json
import re
import time
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery.utils.log import get_logger
from redis import Redis

from services.broker import scripts
from services.broker.keys import (
    BINDINGS,
    DEAD_LETTER,
    DEAD_LETTER_KEYS,
    PRIORITY_SEPARATOR,
    SCHEDULED_COPIES,
    SCHEDULED_KEYS,
    SWEEPS,
    UNACKED,
    UNACKED_KEYS,
)
from services.delivery.unacked import Rules

logger = get_logger(__name__)

# So many messages take Redis a millisecond or two; the next call follows at once.
SWEEP_LIMIT = 100


def unix_time() -> float:
    """Seconds since 1970, the clock of ETAs."""
    return time.time()


@dataclass(frozen=True)
class Sweep:
    """What a sweep has done, and what it found.

    `next_in`: seconds until the next lease ends or the next task is due; None: nothing waits. `stock`: tags of other
    workers' messages that are overdue. `unreported` and `dead_letters`: ids of dead letters whose failure nobody has
    reported, and of those that this sweep has made.
    """

    requeued: int
    promoted: int
    next_in: float | None
    stock: list[str]
    unreported: list[int]
    dead_letters: list[int]


def sweep(client: Redis, rules: Rules) -> Sweep:
    """Requeue messages of dead workers and put what is due into its queue, in one call.

    Raises redis.exceptions.RedisError.
    """
    keys = [*UNACKED_KEYS, *DEAD_LETTER_KEYS, SWEEPS, *SCHEDULED_KEYS]
    arguments = [
        scripts.as_json(rules.priority_steps),
        rules.max_deliveries,
        DEAD_LETTER,
        rules.lease,
        rules.visibility_timeout,
        SWEEP_LIMIT,
        PRIORITY_SEPARATOR,
        SCHEDULED_COPIES,
    ]
    now, ends, due, requeued, promoted, stock, unreported, letters = scripts.SWEEP(client, keys, arguments)
    moments = [float(moment) - float(now) for moment in (ends, due) if moment]
    return Sweep(
        requeued,
        promoted,
        max(0.0, min(moments)) if moments else None,
        [tag.decode() for tag in stock],
        [int(number) for number in unreported],
        [int(number) for number in letters],
    )


def requeue_overdue(client: Redis, tags: Iterable[str], steps: Sequence[int]) -> int:
    """Requeue what stock consumers have not acknowledged for a visibility timeout. Returns how many.

    As kombu does it, except that a message without a binding goes to the queue that is named like its routing key,
    where kombu 5.7 drops it. Raises redis.exceptions.RedisError.
    """
    return sum(_requeue_stock(client, tag, steps) for tag in tags)


def _requeue_stock(client: Redis, tag: str, steps: Sequence[int]) -> int:
    record: Any = client.hget(UNACKED, tag)
    if record is None:
        return 0
    try:
        message, exchange, routing_key = json.loads(record)
        text, step = _redelivered(message), _step(_fields(message, "properties").get("priority"), steps)
        queues = _queues(client, exchange, routing_key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.error("lease: %s in %s is no message of kombu's: %r; it stays there", tag, UNACKED, error)
        return 0
    targets: list[str] = []
    for queue in queues:
        targets += [queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}", text]
    return int(scripts.REQUEUE_STOCK(client, UNACKED_KEYS, [tag, record, *targets]))


def _redelivered(message: dict[str, Any]) -> str:
    """A message with the marks that kombu puts on what it restores, where it has fields for them."""
    for fields in (_fields(message, "headers"), _fields(_fields(message, "properties"), "delivery_info")):
        fields["redelivered"] = True
    return json.dumps(message)


def _fields(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get(name)
    return found if isinstance(found, dict) else {}


def _queues(client: Redis, exchange: str, routing_key: str) -> list[str]:
    """Where an exchange sends a routing key, as the table of its bindings says; else to the queue of that name."""
    if not exchange:
        return [routing_key]
    bindings: Any = client.smembers(BINDINGS + exchange)
    members = [member.decode().split(PRIORITY_SEPARATOR) for member in bindings]
    # A pattern is what kombu has made of a topic exchange's binding.
    return [
        queue for key, pattern, queue in members if key == routing_key or (pattern and re.match(pattern, routing_key))
    ] or [routing_key]


def _step(priority: Any, steps: Sequence[int]) -> int:
    try:
        number = max(0, min(9, int(priority)))
    except (TypeError, ValueError):
        number = 0
    return steps[bisect(steps, number) - 1]
