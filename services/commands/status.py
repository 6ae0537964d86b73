"""What goes on in the stack: nodes, queue lengths, beat's last tick."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from services.broker import keys, messages
from services.broker.client import connect
from services.pool import overtime

# Nodes answer within milliseconds, a busy solo node not at all: waiting longer does not make the list longer.
ANSWER_SECONDS = 1.0
# Keys that are looked through for queues, a thousand with each command, for which Redis does nothing else for 1.5 ms. A
# broker alone has a few thousand; a million, where results share its database, takes 1.5 s of Redis's time, twice.
MOST_KEYS = 1_000_000
KEYS_AT_ONCE = 1000
# Lists of names that nobody has declared whose oldest message is read, to tell tasks from what another program keeps:
# each costs a round trip, so that this many take about as long as the nodes are waited for.
MOST_LISTS = 1000


def status(app: Celery) -> tuple[dict[str, Any], int]:
    """The state of the stack and the exit code: 0, whatever is wrong in it, or 1 where Redis does not answer."""
    # Other programs may keep there what is no text.
    options = {"decode_responses": True, "encoding_errors": "backslashreplace"}
    client = connect(app.settings.broker_url, app.settings, **options)
    try:
        # At once, where Celery would try again for a while.
        client.ping()
        found, silent = nodes(app)
        known = known_queues(client, app)
        taken = {queue for node in found.values() for queue in node["queues"]}
        answer = {
            "nodes": found,
            "silent_nodes": silent,
            "queues": waiting(client, known),
            "unread": unread(client, known, taken if found and not silent else None),
            "overtime": overtime.read(client),
            "unacked": int(client.hlen(keys.UNACKED)),
            "scheduled": int(client.zcard(keys.SCHEDULED)),
            "dead_letters": int(client.zcard(keys.DEAD_LETTERS)),
            "beat": {"seconds_since_tick": seconds_since_tick(client)},
        }
    except (RedisError, OperationalError, OSError) as error:
        return {"error": f"Redis does not answer: {error}"}, 1
    return answer, 0


def nodes(app: Celery) -> tuple[dict[str, dict[str, Any]], int]:
    """Every node that answers: its pool, its size, what it runs, the queues it takes from; and how many do not."""
    with app.connection_for_read() as connection:
        stats = app.control.inspect(timeout=ANSWER_SECONDS, connection=connection).stats() or {}
        silent = max(0, (connection.default_channel.heard or 0) - len(stats))
    if not stats:
        return {}, silent
    known = app.control.inspect(destination=list(stats), timeout=ANSWER_SECONDS, limit=len(stats))
    active, taken = known.active() or {}, known.active_queues() or {}
    found = {
        name: {
            "pool": pool_name(stats[name]["pool"]["implementation"]),
            "concurrency": stats[name]["pool"]["max-concurrency"],
            "running": [{"id": task["id"], "name": task["name"]} for task in active.get(name, [])],
            "queues": sorted(queue["name"] for queue in taken.get(name) or []),
        }
        for name in sorted(stats)
    }
    # One that has begun a solo task in between has not said from which queues it takes.
    return found, silent + len(stats.keys() - taken.keys())


def pool_name(implementation: str) -> str:
    """What WORKER_POOL calls the pool of this class, such as celery.concurrency.thread:TaskPool."""
    module = implementation.partition(":")[0].rpartition(".")[2]
    return "threads" if module == "thread" else module


def known_queues(client: Redis, app: Celery) -> list[str]:
    """Every task queue that has ever been declared on this broker, and those that the settings name."""
    found = set(app.settings.worker.queues) | {keys.DEFAULT_QUEUE}
    for key in scan_keys(client, "set", keys.BINDINGS + "*"):
        if keys.carries_tasks(key):
            found |= {keys.parse_bound_queue(str(member)) for member in client.smembers(key)}
    return sorted(found)


def waiting(client: Redis, names: list[str]) -> dict[str, int]:
    """Messages that wait in each queue, all priorities together."""
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for key in keys.get_lists(name):
                pipe.llen(key)
        lengths = pipe.execute()
    steps = len(keys.PRIORITY_STEPS)
    return {name: sum(lengths[index * steps : (index + 1) * steps]) for index, name in enumerate(names)}


def unread(client: Redis, known: Collection[str], taken: set[str] | None) -> list[dict[str, Any]]:
    """Lists with tasks that no node reads: queue, priority and how many wait there.

    `known` are queues that somebody has declared, `taken` those that a node takes from; None where that cannot be told
    of all nodes: then only the priorities count that none of them reads.
    """
    found = []
    for key in sorted(set(scan_keys(client, "list"))):
        queue, priority = keys.parse_list(key)
        if keys.is_mailbox(queue) or (priority in keys.PRIORITY_STEPS and (taken is None or queue in taken)):
            continue
        found.append((key, queue, priority))
    # What was declared holds tasks, whatever they look like.
    strange = [key for key, queue, _ in found if queue not in known]
    foreign = {key for number, key in enumerate(strange) if number >= MOST_LISTS or not holds_tasks(client, key)}
    mine = [each for each in found if each[0] not in foreign]
    with client.pipeline(transaction=False) as pipe:
        for key, *_ in mine:
            pipe.llen(key)
        lengths = pipe.execute()
    return [
        {"queue": queue, "priority": priority, "waiting": length}
        for (_, queue, priority), length in zip(mine, lengths, strict=True)
        if length
    ]


def holds_tasks(client: Redis, key: str) -> bool:
    """Whether the oldest message of a list is a task's."""
    oldest = client.lindex(key, -1)
    return bool(oldest and messages.parse(str(oldest).encode(), ["json"]).task)


def scan_keys(client: Redis, kind: str, match: str = "*") -> Iterator[str]:
    """The keys of a type, as far as they are among the first MOST_KEYS of all keys."""
    cursor = 0
    for _ in range(MOST_KEYS // KEYS_AT_ONCE):
        found: Any
        cursor, found = client.scan(cursor, match=match, count=KEYS_AT_ONCE, _type=kind)
        yield from found
        if not cursor:
            return


def seconds_since_tick(client: Redis) -> float | None:
    """Age of beat's last tick in seconds, read from the lock that each tick renews; None where no beat has it."""
    left = int(client.pttl(keys.BEAT_LOCK))
    return round(keys.BEAT_LOCK_SECONDS - left / 1000, 1) if left >= 0 else None
