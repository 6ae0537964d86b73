"""Revocations, kept in Redis: a node that starts later, or was cut off when they were broadcast, reads them there."""

from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any, NamedTuple

from celery.utils.collections import LimitedSet
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from kombu.utils.json import dumps, loads
from redis import Redis

from services.broker import scripts
from services.broker.keys import REVOKED_STAMPS, REVOKED_TASKS

# A queue without a worker for longer than a month has been given up. Celery's three hours only bound memory, which
# MAX_KEPT does here.
KEEP_SECONDS = 30 * 24 * 3600
# As many as Celery keeps in a node's memory (its REVOKES_MAX); 7 MB of Redis.
MAX_KEPT = 50_000

# The remote control commands that revoke.
COMMANDS = ("revoke", "terminate", "revoke_by_stamped_headers")

# Celery never removes a stamp from its own dictionary: this set has a bound, and Celery's dictionary is a copy of it.
_stamps = LimitedSet(maxlen=MAX_KEPT, expires=KEEP_SECONDS)


class Revocations(NamedTuple):
    """Ids of tasks, and stamps as texts, with the seconds until each is forgotten; oldest first."""

    ids: dict[str, float]
    stamps: dict[str, float]


def parse_ids(given: Any) -> list[str]:
    """The ids of tasks in a command: one or several."""
    return [str(one) for one in maybe_list(given) or []]


def parse_headers(given: Any) -> dict[str, Any]:
    """The stamped headers in a command: a name with its values, or `name=value` from a command line.

    Raises ValueError.
    """
    if isinstance(given, Mapping):
        return dict(given)
    pairs = [one.partition("=") for one in given or []]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise ValueError(f"a stamped header is written name=value, not {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def format_stamps(headers: Mapping[str, Any]) -> list[str]:
    """A text for each value of these headers."""
    return [dumps([name, value]) for name, values in headers.items() for value in maybe_list(values) or []]


def store(client: Redis, key: str, members: Iterable[str]) -> None:
    """Keep ids of tasks, or stamps, under `key` for nodes that are not there now.

    Raises redis.exceptions.RedisError.
    """
    # JSON can spell half a character in an id, which UTF-8 cannot.
    encoded = [member.encode(errors="surrogatepass") for member in members]
    if encoded:
        scripts.REVOKE(client, [key], [KEEP_SECONDS, MAX_KEPT, *encoded[-MAX_KEPT:]])


def store_command(client: Redis, command: str, arguments: Mapping[str, Any]) -> None:
    """Keep what one of COMMANDS revokes.

    Raises ValueError, redis.exceptions.RedisError.
    """
    if command == "revoke_by_stamped_headers":
        store(client, REVOKED_STAMPS, format_stamps(parse_headers(arguments.get("headers"))))
    else:
        store(client, REVOKED_TASKS, parse_ids(arguments.get("task_id")))


def load(client: Redis) -> Revocations:
    """Read the revocations that are kept.

    Raises redis.exceptions.RedisError.
    """
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    with client.pipeline(transaction=False) as pipe:
        for key in (REVOKED_TASKS, REVOKED_STAMPS):
            pipe.zrangebyscore(key, f"({now:.6f}", "+inf", withscores=True)
        ids, stamps = (
            {member.decode(errors="surrogatepass"): end - now for member, end in found} for found in pipe.execute()
        )
    return Revocations(ids, stamps)


def remember(revocations: Revocations) -> None:
    """Add to this node's memory, which is Celery's, the revocations that it does not know."""
    # For as long as in Redis, which is longer than Celery's own three hours.
    worker_state.revoked.expires = max(worker_state.revoked.expires, KEEP_SECONDS)
    for known, found in ((worker_state.revoked, revocations.ids), (_stamps, revocations.stamps)):
        for member, left in found.items():
            if member not in known:
                known.add(member, monotonic() - (KEEP_SECONDS - left))
    _copy_stamps()


def remember_stamps(stamps: Iterable[str]) -> None:
    """Add to this node's memory stamps that are revoked just now."""
    _stamps.update(list(stamps))
    _copy_stamps()


def _copy_stamps() -> None:
    stamps: dict[str, list[Any]] = {}
    for text in _stamps:
        name, value = loads(text)
        stamps.setdefault(name, []).append(value)
    # Not cleared first: threads of the pool look into it, and must find all stamps at every moment.
    worker_state.revoked_stamps.update(stamps)
    for forgotten in worker_state.revoked_stamps.keys() - stamps.keys():
        del worker_state.revoked_stamps[forgotten]
