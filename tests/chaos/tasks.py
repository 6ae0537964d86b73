"""Tasks that mark their start and end outside Redis, and a witness that marks when their node stood still.

Imports nothing of ours: it runs in nodes of every kind.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from celery import shared_task
from celery.signals import worker_ready

# Short beside a third of the shortest lease, long beside what a look at the clock costs.
PULSE_SECONDS = 0.1


def note(word: str, task: str, node: str = "-", number: float = 0) -> None:
    """Append a line to a file of this process's own, in one write: a kill leaves all of it or none."""
    line = f"{word} {task} {os.getpid()} {node} {time.monotonic():.6f} {time.time():.6f} {number:g}\n"
    path = f"{os.environ['CHAOS_MARKS']}/{socket.gethostname()}-{os.getpid()}"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@worker_ready.connect
def watch(sender: Any, **_: Any) -> None:
    """Have a node tell when it got no processor for so long that it may have lost its leases.

    They are renewed each third of their length: who stands still for less than the rest loses none.
    """
    longest = int(os.environ["WORKER_LEASE"]) * 2 / 3
    threading.Thread(target=tell_stalls, args=(sender.hostname, longest), name="pulse", daemon=True).start()


def tell_stalls(node: str, longest: float) -> None:
    """Look at the clock again and again; a thread that holds no lock comes late only with its whole process."""
    before = time.monotonic()
    while True:
        time.sleep(PULSE_SECONDS)
        now = time.monotonic()
        if now - before >= longest:
            note("stalled", "-", node, now - before)
        before = now


def mark(word: str, request: Any) -> None:
    """A mark of the task that runs, with the number of its delivery where the transport tells."""
    note(word, request.id, request.hostname, request.get("delivery_count") or 1)


@shared_task(bind=True, name="chaos.work")
def work(self: Any, seconds: float) -> str:
    """Take that long, as a task does that talks to a slow service."""
    mark("start", self.request)
    time.sleep(seconds)
    mark("end", self.request)
    # The same from every run: a chord counts a header that ran twice once.
    return "done"


@shared_task(bind=True, name="chaos.poison")
def poison(self: Any, number: int) -> None:
    """End the process that runs it, as a crash in C code or the kernel's OOM killer does."""
    mark("start", self.request)
    mark("dies", self.request)
    # One that the interpreter's fault handler reports ends the process all the same.
    os.kill(os.getpid(), number)
    time.sleep(60)


@shared_task(bind=True, name="chaos.gather")
def gather(self: Any, results: list[str]) -> int:
    """The body of a chord: how many of its header's tasks have ended."""
    mark("start", self.request)
    mark("end", self.request)
    return len(results)
