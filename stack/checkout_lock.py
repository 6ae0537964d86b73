"""One command at a time changes the stack: two `make up` must not start two Redis on the same data."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TextIO

from stack import paths

# Writing a name takes less than a millisecond, and more on a busy machine.
NAME_SECONDS = 1.0


@contextmanager
def lock_checkout() -> Iterator[None]:
    """Hold this checkout's lock; waits for the command that has it. The kernel frees the lock when we die."""
    paths.STATE.mkdir(mode=0o700, exist_ok=True)
    with open(paths.LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for {_read_owner(lock)} in this checkout …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"'make {' '.join(sys.argv[1:2])}' (pid {os.getpid()})\n")
        lock.flush()
        try:
            yield
        finally:
            # Whoever comes at the moment when the next one takes the lock must not read this name.
            lock.truncate(0)


def _read_owner(lock: TextIO) -> str:
    """The command that has the lock; it writes its name a moment after it has got the lock."""
    end = monotonic() + NAME_SECONDS
    while True:
        lock.seek(0)
        name = lock.read().strip()
        if name or monotonic() > end:
            return name or "another make"
        sleep(0.01)
