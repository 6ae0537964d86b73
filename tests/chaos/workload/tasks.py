"""Tasks that record their start and end outside Redis, and a thread that records when their node was stalled.

Imports nothing of ours: it runs in Stalk's nodes and in stock ones.
"""

import os
import socket
import threading
import time
from typing import Any

from celery import shared_task
from celery.signals import worker_ready

# Short beside a third of the shortest lease, long beside the cost of reading the clock.
PULSE_SECONDS = 0.1


def record(word: str, task: str, node: str = "-", number: float = 0) -> None:
    """Append an event to this process's own file, in one write: a kill leaves all of it or none."""
    line = f"{word} {task} {os.getpid()} {node} {time.monotonic():.6f} {number:g}\n"
    path = f"{os.environ['CHAOS_EVENTS']}/{socket.gethostname()}-{os.getpid()}"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@worker_ready.connect
def watch(sender: Any, **_: Any) -> None:
    """Start a thread that records when the node got no processor for so long that it may have lost its leases.

    They are renewed each third of their length: a node that is stalled for less than the rest loses none.
    """
    longest = int(os.environ["WORKER_LEASE"]) * 2 / 3
    threading.Thread(target=record_stalls, args=(sender.hostname, longest), name="pulse", daemon=True).start()


def record_stalls(node: str, longest: float) -> None:
    """Watch the clock; a thread that holds no lock is late only when its whole process is."""
    before = time.monotonic()
    while True:
        time.sleep(PULSE_SECONDS)
        now = time.monotonic()
        if now - before >= longest:
            record("stalled", "-", node, now - before)
        before = now


def record_task(word: str, request: Any) -> None:
    """Record an event of the running task, with its delivery count where the transport has one."""
    record(word, request.id, request.hostname, request.get("delivery_count") or 1)


@shared_task(bind=True, name="chaos.work")
def work(self: Any, seconds: float) -> str:
    """Sleep, as a task does that waits for a slow service."""
    record_task("start", self.request)
    time.sleep(seconds)
    record_task("end", self.request)
    # Every run returns the same: a chord counts a header task that ran twice only once.
    return "done"


@shared_task(bind=True, name="chaos.poison")
def poison(self: Any, number: int) -> None:
    """End the process that runs it, as a crash in C code or the kernel's OOM killer does."""
    record_task("start", self.request)
    record_task("dies", self.request)
    # One that the interpreter's fault handler reports ends the process all the same.
    os.kill(os.getpid(), number)
    time.sleep(60)


@shared_task(bind=True, name="chaos.gather")
def gather(self: Any, results: list[str]) -> int:
    """The body of a chord: how many of its header's tasks have ended."""
    record_task("start", self.request)
    record_task("end", self.request)
    return len(results)
