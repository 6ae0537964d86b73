"""The schedule: tasks that wait in Redis for their time are listed, deleted, and put back into their queues."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from redis import Redis

from services.broker import scripts
from services.broker.keys import (
    PRIORITY_STEPS,
    SCHEDULED,
    SCHEDULED_KEYS,
    SCHEDULED_MESSAGES,
    UNACKED_KEYS,
    get_scheduled_fields,
)

# For somebody who reads the schedule, and for the size of a worker's reply to remote control.
MAX_LISTED = 1000
MAX_LISTED_BYTES = 1_000_000
# A call takes a few milliseconds then, in which Redis does nothing else.
MAX_LOOKED_AT = 5000
BATCH_SIZE = 500


class ScheduledMessage(NamedTuple):
    """A message that is put into `queue` when it is `due` (Unix time)."""

    due: float
    queue: str
    message: bytes


def list_next(client: Redis, queues: Sequence[str]) -> list[ScheduledMessage]:
    """The messages that wait for their time in these queues, the next one first; MAX_LISTED at most.

    Raises redis.exceptions.RedisError.
    """
    found = scripts.LIST_SCHEDULED(client, SCHEDULED_KEYS, [MAX_LISTED, MAX_LOOKED_AT, MAX_LISTED_BYTES, *queues])
    triples = zip(found[::3], found[1::3], found[2::3], strict=True)
    return [ScheduledMessage(float(due), queue.decode(), message) for due, queue, message in triples]


def find_records(client: Redis, task_ids: Iterable[str]) -> dict[bytes, bytes]:
    """The records of these tasks that wait for their time, by field.

    Raises redis.exceptions.RedisError.
    """
    fields = [field for task_id in task_ids for field in get_scheduled_fields(task_id)]
    records: list[Any] = client.hmget(SCHEDULED_MESSAGES, fields) if fields else []
    return {field: record for field, record in zip(fields, records, strict=True) if record is not None}


def delete(client: Redis, fields: Sequence[bytes]) -> set[bytes]:
    """Delete these fields. Returns those that this call has deleted, and no other process.

    Raises redis.exceptions.RedisError.
    """
    commands = [(3, *words, field) for field in fields for words in (("HDEL", SCHEDULED_MESSAGES), ("ZREM", SCHEDULED))]
    # A script, because a Redis at maxmemory refuses a transaction.
    deleted = scripts.COMMANDS(client, [], [word for command in commands for word in command])[::2]
    return {field for field, count in zip(fields, deleted, strict=True) if count}


def purge(client: Redis, queue: str) -> tuple[int, set[bytes]]:
    """Delete all that waits for its time to come into `queue`.

    Returns how many, and which tasks among them waited for a token of their rate. Raises redis.exceptions.RedisError.
    """
    cursor: Any = b"0"
    deleted, rate_limited = 0, set()
    while True:
        cursor, count, tasks = scripts.PURGE_SCHEDULED(client, SCHEDULED_KEYS, [queue, cursor, BATCH_SIZE])
        deleted += int(count)
        rate_limited |= set(tasks)
        if cursor == b"0":
            return deleted, rate_limited


class Moved(NamedTuple):
    """How many tasks were put back into their queues, and how many leases have not run out."""

    scheduled: int
    requeued: int
    leased: int


def to_plain(client: Redis) -> Moved:
    """Put all that waits for its time, and the tasks of dead workers, back into their queues.

    Raises redis.exceptions.RedisError.
    """
    scheduled = requeued = 0
    while True:
        arguments = [scripts.as_json(PRIORITY_STEPS), BATCH_SIZE]
        waited, of_dead, leased = scripts.TO_PLAIN(client, [*UNACKED_KEYS, *SCHEDULED_KEYS], arguments)
        scheduled, requeued = scheduled + waited, requeued + of_dead
        if not waited and not of_dead:
            return Moved(scheduled, requeued, leased)
