"""A task module as a user adds one: copied into the clone's services/tasks/, and found there by itself."""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import shared_task
from redis.exceptions import ConnectionError, TimeoutError

# A test that has failed releases nothing; one that waits for much else before it does takes minutes.
LONGEST_SECONDS = 600
# More than a child that has run a task differs from one that has not, and less than the node has more than either.
HOG_CHUNK = 6 * 2**20


@shared_task(bind=True)
def mark(self: Any, name: str, seconds: list[float | None]) -> str:
    """Write each start and end into the Redis list marks:NAME, and sleep between them; return the node's name.

    The first start of a task sleeps for seconds[0], the next for seconds[1], and so on; None is until the key
    release:NAME is there.
    """
    redis, task, node = self.backend.client, self.request.id, self.request.hostname

    def write(what: str) -> None:
        persistently(redis.rpush, f"marks:{name}", json.dumps({"what": what, "task": task, "node": node}))

    start = persistently(redis.incr, f"starts:{task}")
    write("started")
    length = seconds[min(start, len(seconds)) - 1]
    end = time.monotonic() + (LONGEST_SECONDS if length is None else length)
    while time.monotonic() < end and not (length is None and persistently(redis.exists, f"release:{name}")):
        time.sleep(min(0.1, max(0.0, end - time.monotonic())))
    write("finished")
    return str(node)


def persistently(command: Callable[..., Any], *arguments: str) -> Any:
    """Ask Redis until it answers: some tests take it away while a task runs."""
    end = time.monotonic() + LONGEST_SECONDS
    while True:
        try:
            return command(*arguments)
        except (ConnectionError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@shared_task
def hog() -> None:
    """Take all memory that the container has, in files at first: those are no process's own, and count all the same."""
    chunk = b"x" * HOG_CHUNK
    with tempfile.TemporaryFile() as file:
        # Until it is killed. Where there is swap, /tmp is full before.
        with suppress(OSError):
            while True:
                file.write(chunk)
        taken = []
        while True:
            taken.append(bytes(chunk[1:]))
