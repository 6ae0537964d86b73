"""One command at a time changes the stack: two `make up` must not start two Redis on the same data."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stack import places


@contextmanager
def own_turn() -> Iterator[None]:
    """Hold this checkout's lock, which the kernel takes back when we die; waits for the command that has it."""
    places.STATE.mkdir(mode=0o700, exist_ok=True)
    with open(places.LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(f"Waiting for {lock.read().strip() or 'another make'} in this checkout …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"'make {' '.join(sys.argv[1:2])}' (pid {os.getpid()})\n")
        lock.flush()
        yield
