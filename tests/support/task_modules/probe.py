"""Tasks for tests, named by CELERY_IMPORTS. They append a line to the file in PROBE_LOG as they start and end."""

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

# A failed test releases no task; other tests wait for minutes before they do.
HOLD_SECONDS = 600


def note(word: str, label: str) -> None:
    """Append a line in a single write, because several processes write at the same time."""
    line = f"{word} {label} {os.getpid()} {time.time()}\n"
    descriptor = os.open(variable("PROBE_LOG"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@shared_task(bind=True)
def rest(self: Task, label: str, seconds: float) -> str:
    """Sleep, as a task does that waits for a slow service; return the node's name."""
    note("start", label)
    time.sleep(seconds)
    note("end", label)
    return str(self.request.hostname)


def wait_released(label: str) -> None:
    """Wait until there is a file LABEL.released beside the log; note when the wait starts and ends."""
    note("start", label)
    released = Path(variable("PROBE_LOG")).with_name(f"{label}.released")
    end = time.monotonic() + HOLD_SECONDS
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
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    note("end", label)
    return label


# Long enough for a busy machine to reach the first line.
@shared_task(soft_time_limit=10, time_limit=12)
def overrun(label: str) -> None:
    """Ignore the soft time limit, so that the hard one kills the process."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    wait_released(label)


@shared_task
def mark(label: str) -> str:
    """Note that the task ran, and nothing else."""
    note("start", label)
    note("end", label)
    return label


@shared_task(acks_late=False)
def hasty(label: str) -> None:
    """Do nothing; acknowledged before it runs, against the application's default."""


@shared_task
def grip(label: str, seconds: float) -> str:
    """Compute in C without releasing the interpreter lock (GIL): no other thread of the process runs."""
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
    """Wait until released, then return, raise or retry; the retry has the label LABEL-again."""
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
    """Return a result that cannot be stored: not JSON, or two megabytes long."""
    note("start", label)
    return object() if kind == "object" else "x" * 2**21


@shared_task(reject_on_worker_lost=False)
def vanish(label: str) -> None:
    """Wait until released, then kill the process, as the OOM killer does; the task is not run again."""
    wait_released(label)
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task
def collect(parts: list[str], label: str) -> list[str]:
    """The body of a chord."""
    note("start", label)
    return parts


@shared_task(bind=True)
def fall(self: Task, label: str) -> str:
    """Return something; at the first delivery, kill the process after its result is stored, before the chord counts."""
    note("start", label)
    if self.request.get("delivery_count", 1) == 1:
        self.backend.on_chord_part_return = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return label


@shared_task
def die(label: str, cure: str = "") -> str:
    """Kill the process that runs it, as the OOM killer does, unless there is a file `cure`."""
    note("start", label)
    if not (cure and Path(cure).exists()):
        os.kill(os.getpid(), signal.SIGKILL)
    note("end", label)
    return label


@shared_task(bind=True, max_retries=1, default_retry_delay=0)
def fail(self: Task, label: str) -> None:
    """Fail, and fail again when retried."""
    note("start", label)
    raise self.retry(exc=ValueError("as it always does"))


@shared_task
def reject(label: str) -> None:
    """Reject the message without a requeue."""
    note("start", label)
    raise Reject("not with me", requeue=False)


@signals.task_rejected.connect
def note_rejected(**_: Any) -> None:
    """Note that a message was not a task."""
    note("rejected", "message")


@inspect_command()
def census(state: Any) -> dict[str, int]:
    """Count the objects of each class, file descriptors and threads of this node's main process."""
    # Cancelled timers stay until they would be due, after a reconnect for half a minute at most: do not count them.
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
