"""The deliveries of this process, by broker, each with its lease manager."""

import atexit
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import redis

from services.delivery.lease_manager import LeaseManager
from services.delivery.leases import Leases
from services.delivery.unacked import Rules, UnackedDeliveries


class Entry(NamedTuple):
    """What this process has of one broker."""

    deliveries: UnackedDeliveries
    manager: LeaseManager


# A renewal that gets no reply, a new connection and the next renewal fit into what is left of a lease after two thirds.
TIMEOUT_PER_LEASE = 1 / 8

_entries: dict[tuple[Any, ...], Entry] = {}
_lock = threading.Lock()
# Called with dead letters whose task is not FAILURE yet; a worker adds its reporter (dead_letters/reporter.py).
_listeners: list[Callable[[list[int]], None]] = []


def deliveries_of(channel: Any) -> UnackedDeliveries:
    """What this process has from the broker of a channel."""
    return _entry(channel).deliveries


def start_lease_manager(channel: Any) -> None:
    """Make sure that what is claimed from a channel's broker is renewed."""
    entry = _entry(channel)
    with _lock:
        entry.manager.start()


def _entry(channel: Any) -> Entry:
    info = channel.connection.client
    key = (info.hostname, info.port, info.virtual_host, info.userid, channel.lease)
    with _lock:
        if key not in _entries:
            client = redis.Redis(connection_pool=_shorten_timeouts(channel.create_pool(), channel.lease))
            deliveries = UnackedDeliveries(_rules(channel), Leases(client, channel.lease))
            _entries[key] = Entry(deliveries, LeaseManager(deliveries, client, _report_dead_letters))
        return _entries[key]


def _rules(channel: Any) -> Rules:
    return Rules(
        channel.lease,
        channel.max_deliveries,
        channel.visibility_timeout,
        tuple(channel.priority_steps),
        tuple(channel.dead_letters),
        channel.dead_letters_max,
        channel.max_requeues,
    )


def _shorten_timeouts(pool: Any, lease: int) -> Any:
    """A pool whose connections give up a silent Redis early enough to renew over another one."""
    options = pool.connection_kwargs
    for name in ("socket_timeout", "socket_connect_timeout"):
        if options.get(name):
            options[name] = min(options[name], lease * TIMEOUT_PER_LEASE)
    return pool


def all_deliveries() -> list[UnackedDeliveries]:
    """What this process has, by broker."""
    with _lock:
        return [entry.deliveries for entry in _entries.values()]


def find_running() -> set[str]:
    """The tags of what has started and not ended: of batches too, which Celery has no request of."""
    return {tag for deliveries in all_deliveries() for tag in deliveries.running()}


def add_dead_letter_listener(listener: Callable[[list[int]], None]) -> None:
    """Have `listener` called with the ids of dead letters whose failure is to be reported, in the manager's thread."""
    _listeners.append(listener)


def _report_dead_letters(ids: list[int]) -> None:
    for listener in _listeners:
        listener(ids)


def close() -> bool:
    """Requeue all that this process has, and end the lease managers. Returns whether Redis knows all of it."""
    with _lock:
        entries = list(_entries.values())
    for deliveries, manager in entries:
        if deliveries.is_of_this_process:
            deliveries.requeue_all()
            manager.close()
    return all(deliveries.is_idle for deliveries, _ in entries)


def _reset_in_child() -> None:
    # The parent's threads do not exist here, and one of them may have held the lock.
    globals()["_lock"] = threading.Lock()
    _entries.clear()
    _listeners.clear()


atexit.register(close)
os.register_at_fork(after_in_child=_reset_in_child)
