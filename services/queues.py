"""Queue names, priorities and the Redis keys they live under: the only module that spells a Redis key."""

from __future__ import annotations

DEFAULT_QUEUE = "celery"
# kombu keeps one list for each priority step; step 0 is the queue's own name.
PRIORITY_SEPARATOR = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
UNACKED = "unacked"
# One set for each exchange: routing key, pattern and queue, joined by the separator.
BINDINGS = "_kombu.binding."
BEAT_PREFIX = "redbeat:"
BEAT_LOCK = BEAT_PREFIX + "lock"
# Flower is a consumer like any other and would sweep the workers' unacked tasks (kombu 5.7): it gets names of
# its own, under which nothing is ever kept.
FLOWER_UNACKED = {
    "unacked_key": "flower-unacked",
    "unacked_index_key": "flower-unacked_index",
    "unacked_mutex_key": "flower-unacked_mutex",
}


def lists_of(queue: str) -> tuple[str, ...]:
    """Every Redis list in which messages of `queue` can wait, most urgent first."""
    return tuple(queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS)


def carries_tasks(binding_key: str) -> bool:
    """Whether an exchange's set of bindings is about tasks, not about events, commands or their replies."""
    exchange = binding_key.removeprefix(BINDINGS)
    return exchange != "celeryev" and not exchange.endswith(".pidbox")


def bound_queue(member: str) -> str:
    """The queue that a member of such a set names."""
    return member.split(PRIORITY_SEPARATOR)[2]
