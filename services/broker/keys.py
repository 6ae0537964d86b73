"""Queue names, priorities and the Redis keys they live under: the only module that spells a Redis key."""

from __future__ import annotations

DEFAULT_QUEUE = "celery"
# kombu keeps one list for each priority step; step 0 is the queue's own name. 0 is the most urgent one, and that of a
# task that names none; RabbitMQ has it the other way round.
PRIORITY_SEPARATOR = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
# What workers hold: kombu's own hash and index, which stock consumers and Flower read as well, and beside them
# what only Stalk knows (services/broker/lua/claim.lua says what is in each).
UNACKED = "unacked"
UNACKED_INDEX = "unacked_index"
UNACKED_LEASES = "unacked_leases"
UNACKED_STARTED = "unacked_started"
HELD = (UNACKED, UNACKED_INDEX, UNACKED_LEASES, UNACKED_STARTED)
SWEEPS = "sweeps"
# Tasks that are due later.
SCHEDULED = "scheduled"
SCHEDULED_MESSAGES = "scheduled_messages"
# As many times the same task can wait there and be found by its id: a retry beside a copy of it, and more than one
# of them is an accident already.
SCHEDULED_COPIES = 5
# Of each task with a rate limit: when its next tokens come (services/broker/lua/token.lua).
RATE_LIMIT = "rate_limit:"
# What was revoked: ids of tasks, and stamps.
REVOKED_TASKS = "revoked_tasks"
REVOKED_STAMPS = "revoked_stamps"
# Messages that go no further (services/broker/lua/dead_letter.lua).
DEAD_LETTERS = "dead_letters"
DEAD_LETTERS_NEXT = "dead_letters_next"
DEAD_LETTERS_UNTOLD = "dead_letters_untold"
DEAD_LETTER = "dead_letter:"
DEAD = (DEAD_LETTERS, DEAD_LETTERS_NEXT, DEAD_LETTERS_UNTOLD)
# The last message of each thread that publishes, and each message of a chord's body.
PUBLISHED = "published:"
# For how many milliseconds a list of a queue that expires may live (services/broker/lua/record.lua).
EXPIRES = "expires:"
# What runs over its limit where nothing can end it, as JSON, by the second of Redis's clock until which that holds.
OVERTIME = "overtime"
# Of a result; Celery's own.
RESULT = "celery-task-meta-"
# One set for each exchange: routing key, pattern and queue, joined by the separator.
BINDINGS = "_kombu.binding."
BEAT_PREFIX = "redbeat:"
BEAT_LOCK = BEAT_PREFIX + "lock"
# A beat that is gone is replaced when its lock runs out: with the next look of the standby, within 30 s.
BEAT_LOCK_SECONDS = 25


def lists_of(queue: str) -> tuple[str, ...]:
    """Every Redis list in which messages of `queue` can wait, most urgent first."""
    return tuple(queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS)


def queue_and_priority(key: str) -> tuple[str, int]:
    """Which messages wait in a list, whoever has made it; workers read those of PRIORITY_STEPS only."""
    queue, _, step = key.rpartition(PRIORITY_SEPARATOR)
    return (queue, int(step)) if queue and step.isdecimal() else (key, PRIORITY_STEPS[0])


def scheduled_fields(task_id: str) -> tuple[bytes, ...]:
    """The names under which messages of this task wait for their time, in the order in which they are taken."""
    copies = (f"{task_id}{PRIORITY_SEPARATOR}{number}" for number in range(2, SCHEDULED_COPIES + 1))
    # JSON can spell half a character in an id, which UTF-8 cannot.
    return tuple(name.encode(errors="backslashreplace") for name in (task_id, *copies))


def carries_tasks(binding_key: str) -> bool:
    """Whether an exchange's set of bindings is about tasks, not about events, commands or their replies."""
    exchange = binding_key.removeprefix(BINDINGS)
    return exchange != "celeryev" and not is_mailbox(exchange)


def is_mailbox(name: str) -> bool:
    """Whether this is the exchange or the queue of commands, or of answers to them."""
    return name.endswith(".pidbox")


def bound_queue(member: str) -> str:
    """The queue that a member of such a set names."""
    return member.split(PRIORITY_SEPARATOR)[2]
