"""Tasks for tests, named by CELERY_IMPORTS. Each start and end is a line in the file that PROBE_LOG names."""

from __future__ import annotations

import gc
import heapq
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from celery import Task, chord, shared_task, signals
from celery.exceptions import Reject
from celery.worker.control import inspect_command

from config import variable

# A test that has failed releases nothing; one that waits for much else before it does takes minutes.
HELD_SECONDS = 600


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


def wait_released(label: str) -> None:
    """Wait, and write that down, until there is a file LABEL.released beside the log."""
    note("start", label)
    released = Path(variable("PROBE_LOG")).with_name(f"{label}.released")
    end = time.monotonic() + HELD_SECONDS
    while not released.exists() and time.monotonic() < end:
        time.sleep(0.05)
    note("end", label)


@shared_task
def hold(label: str) -> str:
    """Run until the test releases it."""
    wait_released(label)
    return label


@shared_task
def burn(label: str, seconds: float) -> str:
    """Keep a core busy in pure Python."""
    note("start", label)
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        turns += 1
    note("end", label)
    return label


# Seconds, in which a busy machine has to get to the first line.
@shared_task(soft_time_limit=10, time_limit=12)
def overrun(label: str) -> None:
    """Do not end when asked to by the soft time limit."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    wait_released(label)


@shared_task
def mark(label: str) -> str:
    """Only say that it ran."""
    note("start", label)
    note("end", label)
    return label


@shared_task(acks_late=False)
def hasty(label: str) -> None:
    """Acknowledged before it runs, as its author wants it."""


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


@shared_task(bind=True, max_retries=1, default_retry_delay=0)
def end(self: Task, label: str, how: str) -> str:
    """Wait until released, then end in one of the ways that a task can; a second try is called LABEL-again."""
    label += "-again" * self.request.retries
    wait_released(label)
    if how == "raises":
        raise ValueError(label)
    if how == "retries" and not self.request.retries:
        raise self.retry(exc=ValueError(label))
    return label


@shared_task
def pass_on(label: str, queue: str) -> None:
    """Wait until released, then send a task to a queue."""
    wait_released(label)
    mark.apply_async((f"{label}-passed-on",), queue=queue)


@shared_task
def pass_on_chord(label: str, queue: str) -> None:
    """Wait until released, then send a chord to a queue."""
    wait_released(label)
    chord(mark.s(f"{label}-{number}").set(queue=queue) for number in range(2))(collect.s(label).set(queue=queue))


@shared_task
def deliver(label: str, kind: str) -> object:
    """Return something that cannot be stored: no JSON, or two megabytes."""
    note("start", label)
    return object() if kind == "object" else "x" * 2**21


@shared_task(reject_on_worker_lost=False)
def vanish(label: str) -> None:
    """Wait until released, then die with the process, as for want of memory; the task is not to be tried again."""
    wait_released(label)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task
def collect(parts: list[str], label: str) -> list[str]:
    """The body of a chord."""
    note("start", label)
    return parts


@shared_task(bind=True)
def fall(self: Task, label: str) -> str:
    """Return something; the first time, die between the storing of it and the counting of it in the task's chord."""
    note("start", label)
    if self.request.get("delivery_count", 1) == 1:
        self.backend.on_chord_part_return = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
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


@signals.task_rejected.connect
def hear_of_rejected(**_: Any) -> None:
    """Write down that a message was no task."""
    note("rejected", "message")


@inspect_command()
def census(state: Any) -> dict[str, int]:
    """How many objects of each class, file descriptors and threads this node has: a prefork pool's parent."""
    # Timers that are cancelled stay until they would have been due, half a minute at most after a reconnect.
    queue, known = state.consumer.timer._queue, state.consumer.timer_entries_before_start
    queue[:] = [each for each in queue if not each.entry.canceled]
    heapq.heapify(queue)
    known -= {entry for entry in known if entry.canceled}
    gc.collect()
    found: Counter[str] = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, gc.get_objects()))
    return {
        **found,
        "file descriptors": len([*Path("/proc/self/fd").iterdir()]),
        "threads": threading.active_count(),
        "resident bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
    }
