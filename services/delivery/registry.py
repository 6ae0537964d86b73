"""The holders of this process, one for each broker, and their keepers."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from services.delivery.lease_manager import Keeper
from services.delivery.unacked import Holder, Rules


@dataclass
class Kept:
    """A holder, and its keeper once something is consumed."""

    holder: Holder
    keeper: Keeper | None = None


# A renewal that gets no answer, a new connection and the next one fit into what is left of a lease after two thirds.
SILENCE_PER_LEASE = 1 / 8

_kept: dict[tuple[Any, ...], Kept] = {}
_lock = threading.Lock()
# Told of dead letters whose task does not say FAILURE yet; a worker puts something here that tells it.
_listeners: list[Callable[[list[int]], None]] = []


def of(channel: Any) -> Holder:
    """The holder for the broker of a channel."""
    return _of(channel).holder


def keep(channel: Any) -> None:
    """Make sure that what is claimed from a channel's broker is kept: start its keeper.

    Start another one when the first has ended: a process may run one worker after the other.
    """
    kept = _of(channel)
    with _lock:
        kept.holder.closing = False
        if kept.keeper is None or not kept.keeper.alive:
            client = redis.Redis(connection_pool=_hurried(channel.own_pool(), channel.lease))
            kept.keeper = Keeper(kept.holder, client, _on_dead_letters)


def _hurried(pool: Any, lease: int) -> Any:
    """A pool whose connections give up a silent Redis early enough to renew over another one."""
    options = pool.connection_kwargs
    for name in ("socket_timeout", "socket_connect_timeout"):
        if options.get(name):
            options[name] = min(options[name], lease * SILENCE_PER_LEASE)
    return pool


def _of(channel: Any) -> Kept:
    info = channel.connection.client
    key = (info.hostname, info.port, info.virtual_host, info.userid, channel.lease)
    with _lock:
        if key not in _kept:
            rules = Rules(
                channel.lease,
                channel.max_deliveries,
                channel.visibility_timeout,
                tuple(channel.priority_steps),
                tuple(channel.dead_letters),
                channel.dead_letters_max,
                channel.max_requeues,
            )
            _kept[key] = Kept(Holder(rules))
        return _kept[key]


def all_holders() -> list[Holder]:
    """Every holder of this process."""
    with _lock:
        return [kept.holder for kept in _kept.values()]


def running() -> set[str]:
    """The tags of what has been started and has not ended: of batches too, which Celery does not know for requests."""
    return {tag for holder in all_holders() for tag in holder.leased()[0]}


def on_dead_letters(listener: Callable[[list[int]], None]) -> None:
    """Have `listener` called with the ids of dead letters whose task has to be told, from the keeper's thread."""
    _listeners.append(listener)


def _on_dead_letters(ids: list[int]) -> None:
    for listener in _listeners:
        listener(ids)


def close() -> bool:
    """Give back everything that this process holds, and end the keepers. Returns whether Redis knows all of it."""
    with _lock:
        kept = list(_kept.values())
    for one in kept:
        if one.holder.own:
            one.holder.release_all()
            if one.keeper:
                one.keeper.close()
    return all(one.holder.idle for one in kept)


def _forget() -> None:
    # The parent's threads do not exist here, and one of them may have held the lock.
    globals()["_lock"] = threading.Lock()
    _kept.clear()
    _listeners.clear()


atexit.register(close)
os.register_at_fork(after_in_child=_forget)
