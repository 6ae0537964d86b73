"""Tasks for tests, named by CELERY_IMPORTS. Each start and end is a line in the file that PROBE_LOG names."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery import Task, shared_task
from celery.exceptions import Reject

from config import variable


def note(word: str, label: str) -> None:
    """Append a line, in one write, because several processes do so at the same time."""
    line = f"{word} {label} {os.getpid()} {time.time()}\n"
    descriptor = os.open(variable("PROBE_LOG"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@shared_task(bind=True)
def rest(self: Task, label: str, seconds: float) -> str:
    """Wait, as a task does that talks to a slow service; return the node's name."""
    note("start", label)
    time.sleep(seconds)
    note("end", label)
    return str(self.request.hostname)


@shared_task
def burn(label: str, seconds: float) -> str:
    """Keep a core busy in pure Python."""
    note("start", label)
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        turns += 1
    note("end", label)
    return label


@shared_task
def mark(label: str) -> str:
    """Only say that it ran."""
    note("start", label)
    note("end", label)
    return label


@shared_task
def grip(label: str, seconds: float) -> str:
    """Compute in C without ever giving up the interpreter lock: no other thread of the process runs."""
    sample = 5_000_000
    began = time.monotonic()
    sum(range(sample))
    size = int(sample * seconds / (time.monotonic() - began))
    note("start", label)
    sum(range(size))
    note("end", label)
    return label


@shared_task
def die(label: str, cure: str = "") -> str:
    """Kill the process that runs it, as the kernel does when memory is short, unless there is a file `cure`."""
    note("start", label)
    if not (cure and Path(cure).exists()):
        os.kill(os.getpid(), signal.SIGKILL)
    note("end", label)
    return label


@shared_task(bind=True, max_retries=1, default_retry_delay=0)
def fail(self: Task, label: str) -> None:
    """Fail, each time that it is tried."""
    note("start", label)
    raise self.retry(exc=ValueError("as it always does"))


@shared_task
def reject(label: str) -> None:
    """Refuse to run, now and later."""
    note("start", label)
    raise Reject("not with me", requeue=False)
