"""Revocations, kept in Redis: a node that starts later, or was cut off when they were told, knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from celery.utils.collections import LimitedSet
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from kombu.utils.json import dumps, loads
from redis import Redis

from services.broker import scripts
from services.broker.keys import REVOKED_STAMPS, REVOKED_TASKS

# A queue without a worker for longer than a month has been given up. Celery's three hours only bound memory, which
# MOST does here.
KEPT_SECONDS = 30 * 24 * 3600
# As many as Celery keeps in a node's memory (its REVOKES_MAX); 7 MB of Redis.
MOST = 50_000

# Of those that are broadcast to nodes, these revoke.
COMMANDS = ("revoke", "terminate", "revoke_by_stamped_headers")

# Celery's own book of stamps is never emptied: this one is, and Celery's is a copy of it.
_stamps = LimitedSet(maxlen=MOST, expires=KEPT_SECONDS)


@dataclass(frozen=True)
class Revoked:
    """Ids of tasks, and stamps as texts, with the seconds until each is forgotten; oldest first."""

    ids: dict[str, float]
    stamps: dict[str, float]


def as_ids(given: Any) -> list[str]:
    """Ids of tasks as a command carries them: one or several."""
    return [str(one) for one in maybe_list(given) or []]


def as_headers(given: Any) -> dict[str, Any]:
    """Stamped headers as a command carries them: a name with its values, or `name=value` from a command line.

    Raises ValueError.
    """
    if isinstance(given, Mapping):
        return dict(given)
    pairs = [one.partition("=") for one in given or []]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise ValueError(f"a stamped header is written name=value, not {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def as_stamps(headers: Mapping[str, Any]) -> list[str]:
    """A text for each value of these headers."""
    return [dumps([name, value]) for name, values in headers.items() for value in maybe_list(values) or []]


def keep(client: Redis, key: str, members: Iterable[str]) -> None:
    """Keep ids of tasks, or stamps, under `key` for everybody who is not there now.

    Raises redis.exceptions.RedisError.
    """
    # JSON can spell half a character in an id, which UTF-8 cannot.
    encoded = [member.encode(errors="surrogatepass") for member in members]
    if encoded:
        scripts.REVOKE(client, [key], [KEPT_SECONDS, MOST, *encoded[-MOST:]])


def keep_command(client: Redis, command: str, arguments: Mapping[str, Any]) -> None:
    """Keep what one of COMMANDS revokes.

    Raises ValueError, redis.exceptions.RedisError.
    """
    if command == "revoke_by_stamped_headers":
        keep(client, REVOKED_STAMPS, as_stamps(as_headers(arguments.get("headers"))))
    else:
        keep(client, REVOKED_TASKS, as_ids(arguments.get("task_id")))


def load(client: Redis) -> Revoked:
    """What was revoked and is not forgotten.

    Raises redis.exceptions.RedisError.
    """
    ids, stamps = (
        {
            member.decode(errors="surrogatepass"): float(left)
            for member, left in zip(found[::2], found[1::2], strict=True)
        }
        for found in scripts.LIST_REVOKED(client, [REVOKED_TASKS, REVOKED_STAMPS], [])
    )
    return Revoked(ids, stamps)


def learn(revoked: Revoked) -> None:
    """Write into this worker's memory, which is Celery's, what it does not know."""
    # For as long as in Redis, which is longer than Celery's own three hours.
    worker_state.revoked.expires = max(worker_state.revoked.expires, KEPT_SECONDS)
    for known, found in ((worker_state.revoked, revoked.ids), (_stamps, revoked.stamps)):
        for member, left in found.items():
            if member not in known:
                known.add(member, monotonic() - (KEPT_SECONDS - left))
    _copy_stamps()


def learn_stamps(stamps: Iterable[str]) -> None:
    """Write stamps that are revoked just now into this worker's memory."""
    _stamps.update(list(stamps))
    _copy_stamps()


def _copy_stamps() -> None:
    stamps: dict[str, list[Any]] = {}
    for text in _stamps:
        name, value = loads(text)
        stamps.setdefault(name, []).append(value)
    # At no moment is one missing: threads of the pool look into it.
    worker_state.revoked_stamps.update(stamps)
    for forgotten in worker_state.revoked_stamps.keys() - stamps.keys():
        del worker_state.revoked_stamps[forgotten]
