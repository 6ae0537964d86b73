"""Which tasks Redis holds, whatever the key, and of whose start it knows.

`python -m tests.chaos.census` prints them where the broker is at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# A message carries the id of its task in its headers; kombu's records hold messages as JSON within JSON.
TASK_ID = re.compile(rb'"id\\*": ?\\*"(chaos-[\w-]+)')
# What is parked is at its end.
PARKED = b"dead_letter"
# Keys that one SCAN returns.
SCANNED = 1000


def tasks_in(client: Any) -> set[str]:
    """The tasks whose message is anywhere in this database, unless it is parked."""
    found: set[str] = set()
    for key in client.scan_iter(count=SCANNED):
        if not key.startswith(PARKED):
            found.update(match.decode() for value in values(client, key) for match in TASK_ID.findall(value))
    return found


def told_in(client: Any) -> set[str]:
    """The tasks that workers hold and of whose start Redis has been told."""
    if not (tags := list(client.smembers("unacked_started"))):
        return set()
    records = [record or b"" for record in client.hmget("unacked", tags)]
    return {match.decode() for record in records for match in TASK_ID.findall(record)[:1]}


def values(client: Any, key: bytes) -> Iterator[bytes]:
    """All that a key holds."""
    kind = client.type(key)
    if kind == b"list":
        yield from client.lrange(key, 0, -1)
    elif kind == b"hash":
        yield from client.hvals(key)
    elif kind == b"zset":
        yield from client.zrange(key, 0, -1)
    elif kind == b"set":
        yield from client.smembers(key)
    elif kind == b"string" and (value := client.get(key)):
        yield value


def main() -> None:
    """Print the tasks and the number of dead letters, as JSON."""
    from config import load
    from services.connections import connect

    settings = load()
    client = connect(settings.broker_url, settings)
    told, tasks, parked = sorted(told_in(client)), sorted(tasks_in(client)), client.zcard("dead_letters")
    print(json.dumps({"tasks": tasks, "told": told, "parked": parked}))


if __name__ == "__main__":
    main()
