"""Tasks that end, or are called, as public bug reports have it. Named by CELERY_IMPORTS beside probe."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from celery import Task, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, WorkerShutdown, WorkerTerminate
from celery.utils.imports import symbol_by_name
from probe import note, wait_released  # type: ignore[import-not-found]  # where it is copied to


class OwnError(BaseException):
    """An error that is no Exception, of somebody's own."""


class SpokenError(BaseException):
    """One whose words are not its arguments."""

    def __init__(self, *, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


ERRORS: dict[str, Callable[[], Any]] = {
    "exit": lambda: sys.exit("no more"),
    "exit-0": lambda: sys.exit(0),
    "interrupt": lambda: raise_(KeyboardInterrupt("pressed")),
    "cancelled": lambda: raise_(asyncio.CancelledError("by a loop")),
    "own": lambda: raise_(OwnError("something", 3)),
    "spoken": lambda: raise_(SpokenError(code=7)),
    "generator": lambda: raise_(GeneratorExit("closed")),
    "memory": lambda: raise_(MemoryError("too much")),
    "value": lambda: raise_(ValueError("plain")),
    "shutdown": lambda: raise_(WorkerShutdown("I am the last")),
    "terminate": lambda: raise_(WorkerTerminate("I am the last")),
}


def raise_(error: BaseException) -> None:
    raise error


@shared_task
def end_with(label: str, how: str) -> None:
    """End with an error."""
    note("start", label)
    ERRORS[how]()


class Hooked(Task):  # type: ignore[misc]
    """A task whose hook is called when it has failed."""

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(f"hook-{type(exc).__name__}", str(args[0]))


@shared_task(base=Hooked)
def end_hooked(label: str, how: str) -> None:
    """End with an error that a hook sees."""
    note("start", label)
    ERRORS[how]()


class EndsInItsHook(Task):  # type: ignore[misc]
    """A task that exits before it has begun."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("start", str(args[0]))
        sys.exit("before it began")


@shared_task(base=EndsInItsHook)
def end_in_hook(label: str) -> None:
    """Never run."""


@shared_task
def call_inside(label: str) -> str:
    """Call a task as a function, and see the error that it raises."""
    note("start", label)
    try:
        end_with(f"{label}-inside", "exit")
    except SystemExit as error:
        return f"exit {error.code}"
    return "nothing"


def wait_for_limit(label: str) -> str:
    """Wait until released; say which soft limit came."""
    note("start", label)
    try:
        while True:
            time.sleep(60)
    except SoftTimeLimitExceeded as error:
        note("soft", label)
        return str(error)


@shared_task
def limitless(label: str) -> str:
    return wait_for_limit(label)


@shared_task(time_limit=3600)
def hard_alone(label: str) -> str:
    return wait_for_limit(label)


@shared_task(soft_time_limit=3)
def soft_alone(label: str) -> str:
    return wait_for_limit(label)


@shared_task(soft_time_limit=7200)
def soft_beyond(label: str) -> str:
    return wait_for_limit(label)


@shared_task(soft_time_limit=1)
def stubborn(label: str) -> None:
    """Do not end when asked to."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    wait_released(label)


@shared_task(time_limit=7200)
def quick(label: str) -> str:
    """End at once, with a limit of its own that nobody needs."""
    note("start", label)
    return label


@shared_task(time_limit=1, acks_on_timeout=False)
def timed_out_again(label: str) -> None:
    """Run into its limit each time that it is started."""
    note("start", label)
    time.sleep(600)


# The second time it has to end and to store its result within it, on a busy machine too.
@shared_task(bind=True, time_limit=6, acks_on_timeout=False)
def timed_out_once(self: Task, label: str) -> str:
    """Run into its limit the first time that it is started."""
    note("start", label)
    if self.request.get("delivery_count") == 1:
        time.sleep(600)
    return label


@shared_task(base=Hooked, time_limit=1)
def timed_out_hooked(label: str) -> None:
    """Run into its limit, and be done by that."""
    note("start", label)
    time.sleep(600)


@shared_task(bind=True)
def requeue(self: Task, label: str, times: int) -> dict[str, Any]:
    """Ask to be run later, until it has been so often."""
    note("start", label)
    seen = {name: self.request.get(name) for name in ("delivery_count", "requeue_count")}
    seen["redelivered"] = self.request.delivery_info["redelivered"]
    if seen["requeue_count"] < times:
        raise Reject("not now", requeue=True)
    return seen


@shared_task(bind=True)
def until_redelivered(self: Task, label: str) -> int:
    """Ask to be run later until this is no first delivery."""
    note("start", label)
    if not self.request.delivery_info["redelivered"]:
        raise Reject("not the first time", requeue=True)
    return int(self.request.get("delivery_count"))


@shared_task(bind=True)
def tell(self: Task, label: str) -> dict[str, Any]:
    """What it is told of its own delivery, and by which process."""
    note("start", label)
    return {
        "redelivered": self.request.delivery_info["redelivered"],
        "delivery_count": self.request.get("delivery_count"),
        "hostname": self.request.hostname,
        "pid": os.getpid(),
    }


@shared_task(bind=True, rate_limit="1/s")
def each_second(self: Task, label: str) -> dict[str, Any]:
    """What it is told of its own delivery; not more than one a second."""
    note("start", label)
    return {"redelivered": self.request.delivery_info["redelivered"], "count": self.request.get("delivery_count")}


@shared_task(rate_limit="1/h")
def seldom(label: str) -> None:
    """Run once an hour."""
    note("start", label)


@shared_task(rate_limit="50/s")
def often(label: str) -> None:
    """Run fifty times a second."""
    note("start", label)


@shared_task
def ignore(label: str) -> None:
    note("start", label)
    raise Ignore


def run_batch(batch: list[Any], how: str) -> str:
    """What a pool runs for a batch of messages."""
    for each in batch:
        note("start", each.args[0])
    if how == "hold":
        wait_released(f"{batch[0].args[0]}-batch")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit("in a batch")
    return how


class Batches(Task):  # type: ignore[misc]
    """A task whose messages run two at a time, as those of celery-batches do, which does not know Celery 5.7 yet."""

    abstract = True
    typing = False
    size = 2
    # What is not in a batch yet: None for a buffer of each connection; that of celery-batches outlives them.
    buffer: list[Any] | None = None

    def Strategy(self, task: Any, app: Any, consumer: Any) -> Any:  # noqa: N802 - Celery's name
        requests: list[Any] = [] if self.buffer is None else self.buffer
        make, pool = symbol_by_name(task.Request), consumer.pool

        def on_return(taken: list[Any]) -> None:
            for request in taken:
                request.acknowledge()

        def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
            requests.append(make(message, on_ack=ack, on_reject=reject, app=app, hostname=consumer.hostname, task=task))
            if len(requests) == self.size:
                taken, requests[:] = list(requests), []
                batch = [SimpleNamespace(id=one.id, args=one.args, request_dict=one.request_dict) for one in taken]
                pool.apply_async(
                    run_batch, (batch, taken[0].args[1]), accept_callback=None, callback=lambda _: on_return(taken)
                )

        return receive


@shared_task(base=Batches)
def in_batches(label: str, how: str) -> None:
    """Run by run_batch."""


@shared_task(base=Batches, buffer=[])
def in_kept_batches(label: str, how: str) -> None:
    """Run by run_batch."""


@shared_task(bind=True)
def die_when_stored(self: Task, label: str) -> str:
    """Return something; the first time, die when it is stored and not acknowledged."""
    note("start", label)
    if not self.request.delivery_info["redelivered"]:
        store = self.backend.store_result

        def store_and_die(task_id: str, result: Any, state: str, **options: Any) -> None:
            store(task_id, result, state, **options)
            if state == "SUCCESS":
                os.kill(os.getpid(), signal.SIGKILL)

        self.backend.store_result = store_and_die
    return label
