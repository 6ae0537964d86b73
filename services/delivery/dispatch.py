"""Dispatch: what follows the last part of a chord is enqueued once, whoever sends it, and however often.

A worker that dies after it has sent a chord's body and before it has said so leaves the last part to the next one,
which sends the body again. Both send it under the same ids.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Dispatch(threading.local):
    group = ""


_dispatch = _Dispatch()


@contextmanager
def dispatching(group: str) -> Iterator[None]:
    """Inside, this thread sends what follows the group of tasks with this id."""
    before, _dispatch.group = _dispatch.group, group
    try:
        yield
    finally:
        _dispatch.group = before


def name_of(message: dict[str, Any]) -> str:
    """What a message is called by whoever sends it for its group; nothing when it is not sent for one."""
    task = message.get("headers", {}).get("id")
    return f"{_dispatch.group}-{task}" if _dispatch.group and task else ""
