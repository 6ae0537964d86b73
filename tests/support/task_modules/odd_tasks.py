"""Tasks that end, or are called, in ways that public bug reports describe. Named by CELERY_IMPORTS beside probe."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from billiard.pool import Worker as ChildProcess
from celery import Task, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, WorkerShutdown, WorkerTerminate
from celery.utils.imports import symbol_by_name
from probe import note, wait_released  # type: ignore[import-not-found]  # where it is copied to


class OwnError(BaseException):
    """A task's own error that is no Exception."""


class SpokenError(BaseException):
    """An error with a text that is not made of its arguments."""

    def __init__(self, *, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


ERRORS: dict[str, Callable[[], BaseException]] = {
    "exit": lambda: SystemExit("no more"),
    "exit-0": lambda: SystemExit(0),
    "interrupt": lambda: KeyboardInterrupt("pressed"),
    "cancelled": lambda: asyncio.CancelledError("by a loop"),
    "own": lambda: OwnError("something", 3),
    "spoken": lambda: SpokenError(code=7),
    "generator": lambda: GeneratorExit("closed"),
    "memory": lambda: MemoryError("too much"),
    "value": lambda: ValueError("plain"),
    "shutdown": lambda: WorkerShutdown("I am the last"),
    "terminate": lambda: WorkerTerminate("I am the last"),
}


@shared_task
def end_with(label: str, how: str) -> None:
    """End with an error."""
    note("start", label)
    raise ERRORS[how]()


class Hooked(Task):  # type: ignore[misc]
    """A task that notes the call of its hook on_failure, with the class of the error."""

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(f"hook-{type(exc).__name__}", str(args[0]))


@shared_task(base=Hooked)
def end_hooked(label: str, how: str) -> None:
    """End with an error, of which the hook is told."""
    note("start", label)
    raise ERRORS[how]()


class ExitsInItsHook(Task):  # type: ignore[misc]
    """A task that exits in its hook before_start."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("start", str(args[0]))
        sys.exit("before it began")


@shared_task(base=ExitsInItsHook)
def end_in_hook(label: str) -> None:
    """Never run."""


@shared_task
def call_inside(label: str) -> str:
    """Call a task as a function, and catch the error that it raises."""
    note("start", label)
    try:
        end_with(f"{label}-inside", "exit")
    except SystemExit as error:
        return f"exit {error.code}"
    return "nothing"


def wait_for_limit(label: str) -> str:
    """Wait for a soft time limit; return its message."""
    note("start", label)
    try:
        while True:
            time.sleep(60)
    except SoftTimeLimitExceeded as error:
        note("soft", label)
        return str(error)


# A task for each combination of time limits of its own.
LIMITS: dict[str, dict[str, int]] = {
    "limitless": {},
    "hard_alone": {"time_limit": 3600},
    "soft_alone": {"soft_time_limit": 3},
    "soft_beyond": {"soft_time_limit": 7200},
}
for name, limits in LIMITS.items():
    shared_task(name=f"{__name__}.{name}", **limits)(wait_for_limit)


@shared_task(soft_time_limit=1)
def stubborn(label: str) -> None:
    """Ignore the signal of the soft time limit."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    wait_released(label)


@shared_task(time_limit=7200)
def quick(label: str) -> str:
    """End at once, long before the time limit."""
    note("start", label)
    return label


@shared_task
def lock_counter(label: str) -> str:
    """Lock the counter that a child shares with its node, as a child that is killed while it reads it leaves it."""
    note("start", label)
    frame: Any = sys._getframe()
    while not isinstance(child := frame.f_locals.get("self"), ChildProcess):
        frame = frame.f_back
    child.on_ready_counter.get_lock().acquire()
    return label


@shared_task(time_limit=1, acks_on_timeout=False)
def timed_out_again(label: str) -> None:
    """Exceed the time limit at each start."""
    note("start", label)
    time.sleep(600)


# Within the limit the second run has to end and to store its result, on a busy machine too.
@shared_task(bind=True, time_limit=6, acks_on_timeout=False)
def timed_out_once(self: Task, label: str) -> str:
    """Exceed the time limit at the first start."""
    note("start", label)
    if self.request.get("delivery_count") == 1:
        time.sleep(600)
    return label


@shared_task(base=Hooked, time_limit=1)
def timed_out_hooked(label: str) -> None:
    """Exceed the time limit, and be acknowledged then."""
    note("start", label)
    time.sleep(600)


@shared_task(bind=True)
def requeue(self: Task, label: str, times: int) -> dict[str, Any]:
    """Ask to be requeued that many times; then return what the request says of its deliveries."""
    note("start", label)
    counts = {name: self.request.get(name) for name in ("delivery_count", "requeue_count")}
    if counts["requeue_count"] < times:
        raise Reject("not now", requeue=True)
    return {**counts, "redelivered": self.request.delivery_info["redelivered"]}


@shared_task(bind=True)
def until_redelivered(self: Task, label: str) -> int:
    """Ask to be requeued at the first delivery; return the count of the second one."""
    note("start", label)
    if not self.request.delivery_info["redelivered"]:
        raise Reject("not the first time", requeue=True)
    return int(self.request.get("delivery_count"))


@shared_task(bind=True)
def tell(self: Task, label: str) -> dict[str, Any]:
    """Return what the request says of its delivery, and which node and process run it."""
    note("start", label)
    return {
        "redelivered": self.request.delivery_info["redelivered"],
        "delivery_count": self.request.get("delivery_count"),
        "hostname": self.request.hostname,
        "pid": os.getpid(),
    }


@shared_task(bind=True, rate_limit="1/s")
def each_second(self: Task, label: str) -> dict[str, Any]:
    """Return what the request says of its delivery; not more than one a second."""
    note("start", label)
    return {"redelivered": self.request.delivery_info["redelivered"], "count": self.request.get("delivery_count")}


@shared_task(rate_limit="1/h")
def seldom(label: str) -> None:
    """Start not more than once an hour."""
    note("start", label)


@shared_task(rate_limit="50/s")
def often(label: str) -> None:
    """Start not more than fifty times a second."""
    note("start", label)


@shared_task
def ignore(label: str) -> None:
    note("start", label)
    raise Ignore


def run_batch(batch: list[Any], how: str) -> str:
    """Run a batch of messages, in the pool; end in the way that they ask for."""
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
    # Requests that wait for a batch: None for a new list for each connection; that of celery-batches outlives them.
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
    """Return something; at the first delivery, kill the process when the result is stored and not acknowledged."""
    note("start", label)
    if not self.request.delivery_info["redelivered"]:
        store = self.backend.store_result

        def store_and_die(task_id: str, result: Any, state: str, **options: Any) -> None:
            store(task_id, result, state, **options)
            if state == "SUCCESS":
                os.kill(os.getpid(), signal.SIGKILL)

        self.backend.store_result = store_and_die
    return label
