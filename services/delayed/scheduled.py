"""Tasks that wait in Redis for their time: found, deleted, and brought back to their queues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from services.broker import scripts
from services.broker.keys import PRIORITY_STEPS, SCHEDULED, SCHEDULED_MESSAGES, UNACKED_KEYS, get_scheduled_fields

KEYS = (SCHEDULED, SCHEDULED_MESSAGES)
# What somebody reads who looks at the schedule; a reply of a worker should not be larger.
MOST = 1000
MOST_BYTES = 1_000_000
# A call takes a few milliseconds then, in which Redis does nothing else.
LOOK_AT = 5000
MOVED_AT_ONCE = 500


@dataclass(frozen=True)
class Waiting:
    """A message that is put into `queue` when it is `due` (Unix time)."""

    due: float
    queue: str
    message: bytes


def first(client: Redis, queues: Sequence[str]) -> list[Waiting]:
    """What waits for its time in these queues, the next one first; not more than anybody wants to read.

    Raises redis.exceptions.RedisError.
    """
    found = scripts.LIST_SCHEDULED(client, KEYS, [MOST, LOOK_AT, MOST_BYTES, *queues])
    triples = zip(found[::3], found[1::3], found[2::3], strict=True)
    return [Waiting(float(due), queue.decode(), message) for due, queue, message in triples]


def of_tasks(client: Redis, task_ids: Iterable[str]) -> dict[bytes, bytes]:
    """The records of these tasks that wait for their time, by the field that each is in.

    Raises redis.exceptions.RedisError.
    """
    fields = [field for task_id in task_ids for field in get_scheduled_fields(task_id)]
    if not fields:
        return {}
    records: list[Any] = client.hmget(SCHEDULED_MESSAGES, fields)
    return {field: record for field, record in zip(fields, records, strict=True) if record is not None}


def remove(client: Redis, fields: Sequence[bytes]) -> set[bytes]:
    """Delete these fields. Returns those that this call has deleted, and nobody else.

    Raises redis.exceptions.RedisError.
    """
    commands = [(3, *words, field) for field in fields for words in (("HDEL", SCHEDULED_MESSAGES), ("ZREM", SCHEDULED))]
    # A Redis at maxmemory takes no transaction.
    deleted = scripts.COMMANDS(client, [], [word for command in commands for word in command])[::2]
    return {field for field, count in zip(fields, deleted, strict=True) if count}


def purge(client: Redis, queue: str) -> tuple[int, set[bytes]]:
    """Delete what waits for its time to come into `queue`.

    Returns how many, and which tasks among them waited for a token of their rate. Raises redis.exceptions.RedisError.
    """
    cursor: Any = b"0"
    deleted, rated = 0, set()
    while True:
        cursor, count, tasks = scripts.PURGE_SCHEDULED(client, KEYS, [queue, cursor, MOVED_AT_ONCE])
        deleted += int(count)
        rated |= set(tasks)
        if cursor == b"0":
            return deleted, rated


@dataclass(frozen=True)
class Moved:
    """What was brought back to the queues, and how many leases have not run out."""

    scheduled: int
    requeued: int
    leased: int


def to_plain(client: Redis) -> Moved:
    """Bring back to their queues what waits for its time, and what dead workers have held.

    Raises redis.exceptions.RedisError.
    """
    scheduled = requeued = 0
    while True:
        arguments = [scripts.as_json(PRIORITY_STEPS), MOVED_AT_ONCE]
        waited, held, leased = scripts.TO_PLAIN(client, [*UNACKED_KEYS, *KEYS], arguments)
        scheduled, requeued = scheduled + waited, requeued + held
        if not waited and not held:
            return Moved(scheduled, requeued, leased)
