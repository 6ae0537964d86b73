"""Dead letters: messages that go no further are listed, looked at, replayed and purged.

They are written by lua/dead_letter.lua. A replay is one script call, so a letter is either here or in its queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import Any

from celery import Celery
from redis import Redis
from redis.exceptions import RedisError

from services.broker import messages, scripts
from services.broker.client import connect
from services.broker.keys import DEAD_LETTER, DEAD_LETTERS, DEAD_LETTERS_UNTOLD, PRIORITY_STEPS
from services.dead_letters.reporter import AWAY, Teller

GOOD, BAD = 0, 1
# What fits on a screen; --all shows the rest.
SHOWN = 20
# Letters hold whole messages: so many are read, moved or deleted with one call, which takes milliseconds.
AT_ONCE = 100

Answer = tuple[dict[str, Any], int]


def listed(app: Celery, everything: bool) -> Answer:
    """The latest dead letters, newest last, or all of them: the object to print and the exit code."""
    try:
        with _redis(app) as client:
            total = client.zcard(DEAD_LETTERS)
            ids = _ids(client, 0 if everything else -SHOWN)
            letters = [_summary(number, letter) for number, letter in _letters(client, ids)]
    except (RedisError, OSError) as error:
        return _away(error)
    return {"dead_letters": letters, "more": max(0, total - len(ids))}, GOOD


def shown(app: Celery, number: int) -> Answer:
    """All that there is of one dead letter, its arguments and options too: the object to print and the exit code."""
    try:
        with _redis(app) as client:
            letters = list(_letters(client, [number]))
    except (RedisError, OSError) as error:
        return _away(error)
    if not letters:
        return _unknown([number])
    return _everything(number, letters[0][1], app.conf.accept_content), GOOD


def replay(app: Celery, numbers: list[int] | None) -> Answer:
    """Put these dead letters back into their queues, or all for None, oldest first: the object and the exit code."""
    replayed: list[int] = []
    try:
        with _redis(app) as client:
            for chunk in _chunks(_ids(client, 0) if numbers is None else numbers):
                arguments = [scripts.as_json(PRIORITY_STEPS), DEAD_LETTER, *chunk]
                there = scripts.REPLAY(client, [DEAD_LETTERS, DEAD_LETTERS_UNTOLD], arguments)
                replayed += [int(number) for number in there]
    except (RedisError, OSError) as error:
        return {"replayed": replayed, "error": _refused(error, len(replayed))}, BAD
    if missing := sorted(set(numbers or []) - set(replayed)):
        return {"replayed": replayed, **_unknown(missing)[0]}, BAD
    return {"replayed": replayed}, GOOD


def _refused(error: Exception, replayed: int) -> str:
    rest = f"the others stay dead letters ({replayed} were replayed)" if replayed else "nothing was replayed"
    return f"Redis refuses: {error}; {rest}"


def purge(app: Celery) -> Answer:
    """Delete all dead letters that there are now: the object to print and the exit code.

    Nobody's wait is left without an end: tasks that do not say FAILURE yet are told first.
    """
    deleted = 0
    try:
        with _redis(app) as client:
            numbers = _ids(client, 0)
            # Those that are told first: that makes room in a Redis that is full.
            deleted += _purge(client, numbers)
            untold = [number for number in numbers if client.sismember(DEAD_LETTERS_UNTOLD, str(number))]
            Teller(app, client).tell(untold)
            deleted += _purge(client, untold)
            left = sum(bool(found) for found in client.smismember(DEAD_LETTERS_UNTOLD, untold)) if untold else 0
    except AWAY as error:
        return {"purged": deleted, "error": f"Redis refuses: {error}; {deleted} dead letters were deleted"}, BAD
    if left:
        why = f"{left} are kept, whose tasks are being told just now that they have failed: purge again in a minute"
        return {"purged": deleted, "error": why}, BAD
    return {"purged": deleted}, GOOD


def _purge(client: Redis, numbers: list[int]) -> int:
    keys = [DEAD_LETTERS, DEAD_LETTERS_UNTOLD]
    return sum(int(scripts.PURGE_LETTERS(client, keys, [DEAD_LETTER, *chunk])) for chunk in _chunks(numbers))


# Reading.


def _ids(client: Redis, first: int) -> list[int]:
    """Ids from position `first` on, oldest first."""
    found: Any = client.zrange(DEAD_LETTERS, first, -1)
    return [int(number) for number in found]


def _letters(client: Redis, ids: list[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
    for chunk in _chunks(ids):
        with client.pipeline(transaction=False) as pipe:
            for number in chunk:
                pipe.hgetall(f"{DEAD_LETTER}{number}")
            found = pipe.execute()
        for number, fields in zip(chunk, found, strict=True):
            if fields:
                yield number, {name.decode(): value for name, value in fields.items()}


def _chunks(ids: Iterable[int]) -> Iterator[list[int]]:
    rest = iter(ids)
    while chunk := list(islice(rest, AT_ONCE)):
        yield chunk


def _summary(number: int, letter: dict[str, bytes], message: messages.TaskMessage | None = None) -> dict[str, Any]:
    message = message or messages.parse(letter["message"], (), body=False)
    return {
        "id": number,
        "when": _when(float(letter["parked_at"])),
        "reason": letter["reason"].decode(),
        "task": message.task,
        "task_id": message.id,
        "queue": letter["queue"].decode(errors="backslashreplace"),
        "deliveries": int(letter["deliveries"]),
        "detail": letter["detail"].decode(errors="backslashreplace"),
    }


def _everything(number: int, letter: dict[str, bytes], accept: Iterable[str]) -> dict[str, Any]:
    message = messages.parse(letter["message"], accept)
    options = {name: value for name, value in message.embed.items() if value}
    found = _summary(number, letter, message) | {
        "args": message.args,
        "kwargs": message.kwargs,
        "options": options,
        # In Redis 0 is the most urgent one.
        "priority": message.properties.get("priority"),
        "headers": message.fields,
        "properties": message.properties,
    }
    if message.problem:
        raw = letter["message"].decode(errors="backslashreplace")
        found |= {"problem": message.problem, "message": raw.encode("unicode_escape").decode("ascii")}
    return found


def _when(moment: float) -> str:
    """Unix time as ISO 8601, in the time zone of this machine."""
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


# Answers.


def _redis(app: Celery) -> Redis:
    return connect(app.settings.broker_url, app.settings)


def _away(error: Exception) -> Answer:
    return {"error": f"Redis does not answer: {error}"}, BAD


def _unknown(numbers: list[int]) -> Answer:
    named = ", ".join(map(str, numbers))
    what = f"there is no dead letter {named}" if len(numbers) == 1 else f"there are no dead letters {named}"
    return {"error": f"{what}: see 'make dead-letters'"}, BAD
