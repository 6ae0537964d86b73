"""Dead letters in Redis: list, read, replay and purge.

lua/dead_letter.lua writes them. A replay is one script call, so a message is either a dead letter or in its queue.
Functions return the JSON object that their command prints; where not all could be done, it has an "error".
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from celery import Celery
from celery.utils.functional import chunks
from redis import Redis
from redis.exceptions import RedisError

from services.broker import messages, scripts
from services.broker.client import connect
from services.broker.keys import DEAD_LETTER, DEAD_LETTERS, DEAD_LETTERS_UNTOLD, PRIORITY_STEPS
from services.dead_letters.reporter import UNAVAILABLE, FailureReporter

# What fits on a screen.
LATEST = 20
# Dead letters hold whole messages: so many are read, moved or deleted with one call, which takes milliseconds.
BATCH = 100
KEYS = [DEAD_LETTERS, DEAD_LETTERS_UNTOLD]


def list_latest(app: Celery, everything: bool) -> dict[str, Any]:
    """The latest dead letters, newest last, or all of them, and how many more there are.

    Raises RedisError or OSError when Redis does not answer.
    """
    with _connect(app) as client:
        total = client.zcard(DEAD_LETTERS)
        ids = _read_ids(client, 0 if everything else -LATEST)
        letters = [_summarize(number, letter) for number, letter in _read_letters(client, ids)]
    return {"dead_letters": letters, "more": max(0, total - len(ids))}


def read(app: Celery, number: int) -> dict[str, Any]:
    """All that there is of one dead letter, its arguments and options too.

    Raises RedisError or OSError when Redis does not answer.
    """
    with _connect(app) as client:
        for _, letter in _read_letters(client, [number]):
            return _describe(number, letter, app.conf.accept_content)
    return {"error": _describe_missing([number])}


def replay(app: Celery, numbers: list[int] | None) -> dict[str, Any]:
    """Put these dead letters back into their queues, or all for None, oldest first."""
    replayed: list[int] = []
    try:
        with _connect(app) as client:
            for batch in chunks(iter(_read_ids(client, 0) if numbers is None else numbers), BATCH):
                arguments = [scripts.as_json(PRIORITY_STEPS), DEAD_LETTER, *batch]
                replayed += [int(number) for number in scripts.REPLAY(client, KEYS, arguments)]
    except (RedisError, OSError) as error:
        count = len(replayed)
        rest = f"the others stay dead letters ({count} were replayed)" if count else "nothing was replayed"
        return {"replayed": replayed, "error": f"Redis refuses: {error}; {rest}"}
    missing = sorted(set(numbers or []) - set(replayed))
    return {"replayed": replayed} | ({"error": _describe_missing(missing)} if missing else {})


def purge(app: Celery) -> dict[str, Any]:
    """Delete all dead letters that there are now, those whose failure is not reported yet after reporting it."""
    purged = 0
    try:
        with _connect(app) as client:
            numbers = _read_ids(client, 0)
            # Reported ones first: that makes room in a Redis that is full.
            purged += _purge(client, numbers)
            unreported = [number for number in numbers if client.sismember(DEAD_LETTERS_UNTOLD, str(number))]
            FailureReporter(app, client).report(unreported)
            purged += _purge(client, unreported)
            left = sum(map(bool, client.smismember(DEAD_LETTERS_UNTOLD, unreported))) if unreported else 0
    except UNAVAILABLE as error:
        return {"purged": purged, "error": f"Redis refuses: {error}; {purged} dead letters were deleted"}
    if left:
        why = f"{left} are kept, because workers are reporting their failure just now: purge again in a minute"
        return {"purged": purged, "error": why}
    return {"purged": purged}


def _purge(client: Redis, numbers: list[int]) -> int:
    batches = chunks(iter(numbers), BATCH)
    return sum(int(scripts.PURGE_LETTERS(client, KEYS, [DEAD_LETTER, *batch])) for batch in batches)


def _connect(app: Celery) -> Redis:
    return connect(app.settings.broker_url, app.settings)


def _read_ids(client: Redis, first: int) -> list[int]:
    """Ids from position `first` on, oldest first."""
    found: Any = client.zrange(DEAD_LETTERS, first, -1)
    return [int(number) for number in found]


def _read_letters(client: Redis, ids: list[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
    for batch in chunks(iter(ids), BATCH):
        with client.pipeline(transaction=False) as pipe:
            for number in batch:
                pipe.hgetall(f"{DEAD_LETTER}{number}")
            found = pipe.execute()
        for number, fields in zip(batch, found, strict=True):
            if fields:
                yield number, {name.decode(): value for name, value in fields.items()}


def _summarize(number: int, letter: dict[str, bytes], message: messages.TaskMessage | None = None) -> dict[str, Any]:
    message = message or messages.parse(letter["message"], (), body=False)
    parked_at = datetime.fromtimestamp(float(letter["parked_at"])).astimezone()
    return {
        "id": number,
        # ISO 8601, in the time zone of this machine.
        "when": parked_at.isoformat(timespec="seconds"),
        "reason": letter["reason"].decode(),
        "task": message.task,
        "task_id": message.id,
        "queue": letter["queue"].decode(errors="backslashreplace"),
        "deliveries": int(letter["deliveries"]),
        "detail": letter["detail"].decode(errors="backslashreplace"),
    }


def _describe(number: int, letter: dict[str, bytes], accept: Iterable[str]) -> dict[str, Any]:
    message = messages.parse(letter["message"], accept)
    found = _summarize(number, letter, message) | {
        "args": message.args,
        "kwargs": message.kwargs,
        "options": {name: value for name, value in message.embed.items() if value},
        # In Redis 0 is the most urgent one.
        "priority": message.properties.get("priority"),
        "headers": message.fields,
        "properties": message.properties,
    }
    if message.problem:
        raw = letter["message"].decode(errors="backslashreplace")
        found |= {"problem": message.problem, "message": raw.encode("unicode_escape").decode("ascii")}
    return found


def _describe_missing(numbers: list[int]) -> str:
    what = f"is no dead letter {numbers[0]}" if len(numbers) == 1 else f"are no dead letters {str(numbers)[1:-1]}"
    return f"there {what}: see 'make dead-letters'"
