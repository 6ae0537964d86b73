"""Names of queues and of Redis keys: the only module that spells them."""

DEFAULT_QUEUE = "celery"
# kombu keeps a list for each priority step; that of step 0 has the queue's own name. 0 is the most urgent one, and that
# of a task that names none; on RabbitMQ it is the least urgent one.
PRIORITY_SEPARATOR = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
# Unacknowledged messages: kombu's own hash and index, which stock consumers and Flower read as well, and what Stalk
# keeps beside them (services/broker/lua/claim.lua says what is in each).
UNACKED = "unacked"
UNACKED_INDEX = "unacked_index"
UNACKED_LEASES = "unacked_leases"
UNACKED_STARTED = "unacked_started"
UNACKED_KEYS = (UNACKED, UNACKED_INDEX, UNACKED_LEASES, UNACKED_STARTED)
SWEEPS = "sweeps"
# Tasks that are due later.
SCHEDULED = "scheduled"
SCHEDULED_MESSAGES = "scheduled_messages"
SCHEDULED_KEYS = (SCHEDULED, SCHEDULED_MESSAGES)
# So many messages of the same task can wait there and be found by its id: a retry beside a copy of it, and more than
# one copy is an accident already.
SCHEDULED_COPIES = 5
# For each task with a rate limit: when its next tokens come (services/broker/lua/token.lua).
RATE_LIMIT = "rate_limit:"
# Revocations: ids of tasks, and stamps.
REVOKED_TASKS = "revoked_tasks"
REVOKED_STAMPS = "revoked_stamps"
# Dead letters (services/broker/lua/dead_letter.lua).
DEAD_LETTERS = "dead_letters"
DEAD_LETTERS_NEXT = "dead_letters_next"
DEAD_LETTERS_UNTOLD = "dead_letters_untold"
DEAD_LETTER = "dead_letter:"
DEAD_LETTER_KEYS = (DEAD_LETTERS, DEAD_LETTERS_NEXT, DEAD_LETTERS_UNTOLD)
# The last message of each thread that publishes, and each message of a chord's body.
PUBLISHED = "published:"
# For how many milliseconds a list of a queue that expires may live (services/broker/lua/record.lua).
EXPIRES = "expires:"
# Tasks over their time limit in pools that cannot end them, as JSON, by the time until which that holds.
OVERTIME = "overtime"
# A result; Celery's own.
RESULT = "celery-task-meta-"
# A set for each exchange: routing key, pattern and queue, joined by the separator.
BINDINGS = "_kombu.binding."
BEAT_PREFIX = "redbeat:"
BEAT_LOCK = BEAT_PREFIX + "lock"
# A beat that is gone is replaced when its lock runs out: with the next look of the standby, within 30 s.
BEAT_LOCK_SECONDS = 25


def get_lists(queue: str) -> tuple[str, ...]:
    """Every Redis list in which messages of `queue` can wait, most urgent first."""
    return tuple(queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS)


def parse_list(key: str) -> tuple[str, int]:
    """The queue and the priority of a list, which another program may have made: workers read PRIORITY_STEPS only."""
    queue, _, step = key.rpartition(PRIORITY_SEPARATOR)
    return (queue, int(step)) if queue and step.isdecimal() else (key, PRIORITY_STEPS[0])


def get_scheduled_fields(task_id: str) -> tuple[bytes, ...]:
    """The fields of `scheduled_messages` that messages of this task can have, the first one first."""
    copies = (f"{task_id}{PRIORITY_SEPARATOR}{number}" for number in range(2, SCHEDULED_COPIES + 1))
    # JSON can spell half a character in an id, which UTF-8 cannot.
    return tuple(name.encode(errors="backslashreplace") for name in (task_id, *copies))


def carries_tasks(binding_key: str) -> bool:
    """Whether an exchange, or its set of bindings, is for tasks, not for events, commands or replies to them."""
    exchange = binding_key.removeprefix(BINDINGS)
    return exchange != "celeryev" and not is_mailbox(exchange)


def is_mailbox(name: str) -> bool:
    """Whether this is the exchange or the queue of remote control commands, or of replies to them."""
    return name.endswith(".pidbox")


def parse_bound_queue(member: str) -> str:
    """The queue in a member of a set of bindings."""
    return member.split(PRIORITY_SEPARATOR)[2]
