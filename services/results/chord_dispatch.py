"""Dispatch: the body of a chord is enqueued once, whoever dispatches it.

A worker that dies after it has enqueued a body and before it has said so leaves the chord to another one, which
enqueues the body again. Most bodies have the ids of their messages from the time when the chord was made, so the second
message can be told from a first one. A body with a chord in it that only a dispatch makes (a group of chords, a chain
of two) gets new groups each time; its messages are different ones then, and are enqueued again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

# Of 128 bits, no two in the hour for which they are known will ever be the same.
NAME_BYTES = 16


class _Dispatch(threading.local):
    run = ""


_dispatch = _Dispatch()


@contextmanager
def dispatching(run: str = "") -> Iterator[None]:
    """Inside, this thread dispatches a chord: what it has said to be `this_run`; nothing yet, or no chord, is ""."""
    before, _dispatch.run = _dispatch.run, run
    try:
        yield
    finally:
        _dispatch.run = before


def this_run(run: str) -> None:
    """Say which run of which chord it is that this thread dispatches: the same chord may be sent again."""
    _dispatch.run = run


def name_of(message: dict[str, Any]) -> str:
    """What a message is called by everybody who dispatches it; "" outside a dispatch."""
    headers = message.get("headers", {})
    if not _dispatch.run or not headers.get("id"):
        return ""
    # The same task may stand in a group more than once.
    parts = (_dispatch.run, headers["id"], headers.get("group"), headers.get("group_index"))
    return blake2b(repr(parts).encode(), digest_size=NAME_BYTES).hexdigest()
