"""Which queues there are on the broker, how many messages wait in each, and which of them no node reads."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from celery import Celery
from redis import Redis

from services.broker import keys, messages

# Keys that are scanned for queues, a thousand with each command, during which Redis does nothing else for 1.5 ms. A
# broker alone has a few thousand; a million, where results share its database, takes 1.5 s of Redis's time, twice.
MOST_KEYS = 1_000_000
KEYS_AT_ONCE = 1000
# Lists of queues that nobody has declared whose oldest message is read, to tell tasks from another program's data: each
# costs a round trip, so this many take about as long as the wait for the nodes.
MOST_LISTS = 1000


def known_queues(client: Redis, app: Celery) -> list[str]:
    """Every task queue that has ever been declared on this broker, and those that the settings name."""
    found = set(app.settings.worker.queues) | {keys.DEFAULT_QUEUE}
    for key in _scan_keys(client, "set", keys.BINDINGS + "*"):
        if keys.carries_tasks(key):
            found |= {keys.parse_bound_queue(str(member)) for member in client.smembers(key)}
    return sorted(found)


def waiting(client: Redis, names: list[str]) -> dict[str, int]:
    """Messages that wait in each queue, all priorities together."""
    lengths = iter(_read_lengths(client, (key for name in names for key in keys.get_lists(name))))
    return {name: sum(islice(lengths, len(keys.PRIORITY_STEPS))) for name in names}


def _read_lengths(client: Redis, lists: Iterable[str]) -> list[int]:
    with client.pipeline(transaction=False) as pipe:
        for key in lists:
            pipe.llen(key)
        return pipe.execute()


def find_unread(client: Redis, known: Collection[str], consumed: set[str] | None) -> list[dict[str, Any]]:
    """Lists with tasks that no node reads: queue, priority and how many wait there.

    `known` are declared queues, `consumed` those that a node consumes; None where not all nodes have answered: then
    only priorities count that no node reads.
    """
    found = []
    for key in sorted(set(_scan_keys(client, "list"))):
        queue, priority = keys.parse_list(key)
        if keys.is_mailbox(queue) or (priority in keys.PRIORITY_STEPS and (consumed is None or queue in consumed)):
            continue
        found.append((key, queue, priority))
    # A declared queue holds tasks, whatever they look like.
    undeclared = [key for key, queue, _ in found if queue not in known]
    foreign = {key for number, key in enumerate(undeclared) if number >= MOST_LISTS or not _holds_tasks(client, key)}
    lists = [each for each in found if each[0] not in foreign]
    lengths = _read_lengths(client, (key for key, *_ in lists))
    return [
        {"queue": queue, "priority": priority, "waiting": length}
        for (_, queue, priority), length in zip(lists, lengths, strict=True)
        if length
    ]


def _holds_tasks(client: Redis, key: str) -> bool:
    """Whether the oldest message of a list is a task's."""
    oldest = client.lindex(key, -1)
    return bool(oldest and messages.parse(str(oldest).encode(), ["json"]).task)


def _scan_keys(client: Redis, kind: str, match: str = "*") -> Iterator[str]:
    """The keys of a type, as far as they are among the first MOST_KEYS of all keys."""
    cursor = 0
    for _ in range(MOST_KEYS // KEYS_AT_ONCE):
        found: Any
        cursor, found = client.scan(cursor, match=match, count=KEYS_AT_ONCE, _type=kind)
        yield from found
        if not cursor:
            return
