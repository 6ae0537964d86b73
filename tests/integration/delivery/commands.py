"""What a worker asks of Redis, step by step and without a transport; and what stands in a message."""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from services.broker import scripts
from services.broker.keys import (
    DEAD_LETTER,
    DEAD_LETTERS,
    DEAD_LETTERS_UNTOLD,
    PRIORITY_STEPS,
    SWEEPS,
    UNACKED_LEASES,
    get_lists,
)
from services.delivery.claim import Claim, ClaimedMessage, claim_command, parse_reply
from services.delivery.unacked import UNKNOWN_TASK, UnackedDeliveries, clock

# How a process ends a delivery, by the kind of update that this makes. The id of its task has half a character in it.
TASK = "half: \ud800"
ENDS: dict[str, Callable[[UnackedDeliveries, str], None]] = {
    "ack": lambda deliveries, tag: deliveries.ack(tag),
    "requeue": lambda deliveries, tag: deliveries.requeue([tag]),
    "crash": lambda deliveries, tag: deliveries.record_crash(tag, "signal 9"),
    "requeue later": lambda deliveries, tag: deliveries.requeue_later(tag, TASK),
    "reject": lambda deliveries, tag: deliveries.reject(tag, UNKNOWN_TASK, "no such task"),
}
# The counts that stand first in a message.
COUNTS = re.compile(
    rb'\s*\{\s*"delivery_count"\s*:\s*(\d+)\s*(?:,\s*"requeue_count"\s*:\s*(\d+)\s*(?=[,}]))?(?:,\s*|(?=\}))'
)


def claim(client: Any, queue: str, lease: int) -> ClaimedMessage:
    """Claim the next message of a queue."""
    asked = Claim(uuid4().hex, 1, (queue,), [], clock())
    [found] = parse_reply(asked, scripts.CLAIM(client, *claim_command(asked, get_lists(queue), lease)))
    return found


def end_leases(client: Any, *tags: str) -> None:
    """Let these leases have ended, as of a dead process, while other processes have swept all the time."""
    client.zadd(UNACKED_LEASES, {tag: number for number, tag in enumerate(tags, 1)}, xx=True)
    client.hset(SWEEPS, mapping={"last": client.time()[0], "rest": 0})


def list_letters(client: Any) -> list[tuple[bytes, bytes]]:
    """Message and queue of each dead letter."""
    numbers = [int(number) for number in client.zrange(DEAD_LETTERS, 0, -1)]
    return [tuple(client.hmget(f"{DEAD_LETTER}{number}", "message", "queue")) for number in numbers]


def replay_letters(client: Any, *numbers: int) -> list[int]:
    """Put these dead letters back into their queues; return the numbers of those that were there."""
    keys, steps = [DEAD_LETTERS, DEAD_LETTERS_UNTOLD], scripts.as_json(PRIORITY_STEPS)
    return [int(number) for number in scripts.REPLAY(client, keys, [steps, DEAD_LETTER, *numbers])]


def read_counts(message: bytes) -> tuple[int, int]:
    """How often a message has been started without asking to be run later, and how often its task has asked to be."""
    found = COUNTS.match(message)
    return (int(found[1]), int(found[2] or 0)) if found else (1, 0)


def add_counts(message: bytes, starts: int, requeues: int = 0) -> bytes:
    """A message with so many more of both: the only change of its bytes that there is."""
    opened = COUNTS.match(message) or re.match(rb"\s*\{", message)
    if not opened:
        return message
    count, asked = read_counts(message)
    counts = b'{"delivery_count":%d' % (count + starts)
    if asked + requeues:
        counts += b',"requeue_count":%d' % (asked + requeues)
    rest = message[opened.end() :]
    return counts + (b"" if re.match(rb"\s*\}", rest) else b",") + rest


def drop_counts(message: bytes) -> bytes:
    """The message as if it had never been started."""
    found = COUNTS.match(message)
    return b"{" + message[found.end() :] if found else message


def build_task(body: Any = ((4, 3), {}, {}), properties: Any = None, count: int = 0, **headers: Any) -> bytes:
    """A message as Celery writes it, except for what is given."""
    task, task_id = "services.tasks.arithmetic.add", uuid4().hex
    plain = {"task": task, "id": task_id, "retries": 0, "eta": None, "expires": None, "timelimit": [None, None]}
    fields = {
        **({"delivery_count": count} if count else {}),
        "body": b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {**plain, "lang": "py", **headers},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            **(properties or {}),
        },
    }
    return json.dumps(fields).encode()
