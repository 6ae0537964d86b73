"""What goes on in the stack: nodes, queue lengths, beat's last tick."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from services import queues
from services.connections import connect

# Nodes answer within milliseconds, a busy solo node not at all: waiting longer does not make the list longer.
ANSWER_SECONDS = 1.0


def status(app: Celery) -> tuple[dict[str, Any], int]:
    """The state of the stack and the exit code: 0, or 1 where Redis does not answer."""
    client = connect(app.settings.broker_url, app.settings, decode_responses=True)
    try:
        # At once, where Celery would try again for a while.
        client.ping()
        answer = {
            "nodes": nodes(app),
            "queues": waiting(client, known_queues(client, app)),
            "unacked": int(client.hlen(queues.UNACKED)),
            "scheduled": int(client.zcard(queues.SCHEDULED)),
            "dead_letters": int(client.zcard(queues.DEAD_LETTERS)),
            "beat": {"seconds_since_tick": seconds_since_tick(client)},
        }
    except (RedisError, OperationalError, OSError) as error:
        return {"error": f"Redis does not answer: {error}"}, 1
    return answer, 0


def nodes(app: Celery) -> dict[str, dict[str, Any]]:
    """Every node that answers: its pool, its size, what it runs, the queues it takes from."""
    inspect = app.control.inspect(timeout=ANSWER_SECONDS)
    stats = inspect.stats() or {}
    if not stats:
        return {}
    known = app.control.inspect(destination=list(stats), timeout=ANSWER_SECONDS, limit=len(stats))
    active, taken = known.active() or {}, known.active_queues() or {}
    return {
        name: {
            "pool": pool_name(stats[name]["pool"]["implementation"]),
            "concurrency": stats[name]["pool"]["max-concurrency"],
            "running": [{"id": task["id"], "name": task["name"]} for task in active.get(name, [])],
            "queues": sorted(queue["name"] for queue in taken.get(name) or []),
        }
        for name in sorted(stats)
    }


def pool_name(implementation: str) -> str:
    """What WORKER_POOL calls the pool of this class, such as celery.concurrency.thread:TaskPool."""
    module = implementation.partition(":")[0].rpartition(".")[2]
    return "threads" if module == "thread" else module


def known_queues(client: Redis, app: Celery) -> list[str]:
    """Every task queue that has ever been declared on this broker, and those that the settings name."""
    found = set(app.settings.worker.queues) | {queues.DEFAULT_QUEUE}
    for key in client.scan_iter(match=queues.BINDINGS + "*", count=1000, _type="set"):
        if queues.carries_tasks(key):
            found |= {queues.bound_queue(str(member)) for member in client.smembers(key)}
    return sorted(found)


def waiting(client: Redis, names: list[str]) -> dict[str, int]:
    """Messages that wait in each queue, all priorities together."""
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for key in queues.lists_of(name):
                pipe.llen(key)
        lengths = pipe.execute()
    steps = len(queues.PRIORITY_STEPS)
    return {name: sum(lengths[index * steps : (index + 1) * steps]) for index, name in enumerate(names)}


def seconds_since_tick(client: Redis) -> float | None:
    """Age of beat's last tick in seconds, read from the lock that each tick renews; None where no beat has it."""
    left = int(client.pttl(queues.BEAT_LOCK))
    return round(queues.BEAT_LOCK_SECONDS - left / 1000, 1) if left >= 0 else None
