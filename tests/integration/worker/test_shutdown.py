"""TERM: running tasks finish, what cannot finish in time goes back to its queue, in every pool."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import pytest

from services.broker.keys import SCHEDULED_MESSAGES, UNACKED
from tests.support.checkout import odd_checkout
from tests.support.harness import Harness, Node, Stack
from tests.support.processes import command_line
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

SOFT_SHUTDOWN = 2
# Time for a busy machine to end a task after a worker has been told to stop.
OVERRUN_SECONDS = 10
HOUR = 3600
# Longer than any test waits: such a task never comes to its end.
ENDLESS = 600
# A node says so when TERM has reached it.
STOPS = "Warm shutdown"
# A program that runs two workers, one after the other, and then ends with a code of its own.
WENT_ON = 7
INSIDE = f"""
import sys
from threading import Thread

from celery.worker import state

from services.app import app

for label, seconds in (("first", 0), ("second", int(sys.argv[1]))):
    state.should_stop = None
    worker = Thread(target=app.Worker(pool="threads", concurrency=1, hostname="inside@h", quiet=True).start)
    worker.start()
    result = app.send_task("probe.rest", [label, seconds])
    result.get(timeout={TIMEOUT_SECONDS}, disable_sync_subtasks=False)
    state.should_stop = 0
    worker.join({TIMEOUT_SECONDS})
sys.exit({WENT_ON})
"""
# Case → pool, and the task that overruns.
OVERRUNS = {
    "prefork": ("prefork", "rest"),
    "threads": ("threads", "burn"),
    "solo": ("solo", "rest"),
    "solo-busy": ("solo", "burn"),
}


@dataclass
class Stopped:
    """A worker that was told to stop while a task ran and another was put off until its ETA."""

    stack: Stack
    worker: Node
    queue: str
    running: Any = None
    code: int = -1
    left: float = 0.0

    def label(self, what: str) -> str:
        return f"{self.queue}-{what}"

    def send(self, task: str, what: str, *arguments: object, **options: Any) -> Any:
        return self.stack.send(f"probe.{task}", self.label(what), *arguments, queue=self.queue, **options)

    def postpone(self) -> None:
        """Make the worker put off a task for later."""
        self.send("mark", "eta", countdown=HOUR)
        self.stack.harness.wait_until(lambda: self.count(SCHEDULED_MESSAGES) == 1, TIMEOUT_SECONDS, "it is put off")

    def count(self, key: str) -> int:
        """Messages of its queue that are unacknowledged, or scheduled."""
        messages = [json.loads(text) for text in self.stack.redis.client().hvals(key)]
        return sum(1 for _, _, routing_key in messages if routing_key == self.queue)

    def check(self, *waiting: str) -> None:
        """All is as after a stop: only these tasks wait in its queue, and what was put off."""
        assert self.code == 0
        assert self.waiting() == [*waiting]
        assert (self.count(UNACKED), self.count(SCHEDULED_MESSAGES)) == (0, 1)

    def waiting(self) -> list[str]:
        """What the tasks that wait in its queue are called."""
        return sorted(text.removeprefix(f"('{self.queue}-").partition("'")[0] for text in texts(self.stack, self.queue))

    def leave(self) -> None:
        """Wait until the worker has left."""
        self.code, self.left = self.worker.exits(TIMEOUT_SECONDS), time()


def texts(stack: Stack, queue: str) -> list[str]:
    """The arguments of the tasks that wait in a queue."""
    return [json.loads(text)["headers"]["argsrepr"] for text in stack.redis.client().lrange(queue, 0, -1)]


def stopping(harness: Harness, seconds: int, **settings: str) -> Stack:
    """A stack whose workers wait for their tasks for so long when they are told to stop."""
    return harness.stack(WORKER_SOFT_SHUTDOWN=str(seconds), WORKER_STOP_GRACE_PERIOD=str(seconds + 15), **settings)


@pytest.fixture(scope="module")
def finished(shared_harness: Harness) -> dict[str, Stopped]:
    """A worker of each pool, told twice to stop in the middle of a task that ends in time."""
    # A worker that waits for more than its tasks does so for longer than a test waits.
    stack = stopping(shared_harness, ENDLESS, WORKER_PREFETCH_MULTIPLIER="4", LOG_LEVEL="debug")
    found = {
        pool: Stopped(stack, stack.worker(WORKER_POOL=pool, WORKER_QUEUES=f"ends-{pool}"), f"ends-{pool}")
        for pool in POOLS
    }
    for one in found.values():
        one.worker.ready()
        one.postpone()
    for one in found.values():
        one.running = one.send("hold", "running")
    for one in found.values():
        shared_harness.wait_started(one.label("running"))
        one.send("mark", "next")
        one.worker.process.terminate()
    for one in found.values():
        one.worker.says("received SIGTERM").process.terminate()
    for pool, one in found.items():
        # From then on nothing more begins there. The main thread of a solo node runs the task, and looks after it.
        one.worker.says("received SIGTERM", times=2).says(STOPS if pool == "solo" else "Stopping Pool")
        shared_harness.release(one.label("running"))
    for one in found.values():
        one.leave()
    return found


@pytest.mark.parametrize("pool", POOLS)
def test_a_running_task_finishes_and_the_next_one_goes_back(finished: dict[str, Stopped], pool: str) -> None:
    one = finished[pool]

    assert one.running.get(timeout=TIMEOUT_SECONDS) == one.label("running")
    assert one.stack.harness.ended(one.label("running")) == 1
    one.check("next")
    assert one.stack.harness.started(one.label("next")) == 0


@pytest.fixture(scope="module")
def overrun(shared_harness: Harness) -> dict[str, Stopped]:
    """Workers told to stop while a task runs that does not end; another, except in solo, ends in between."""
    stack = stopping(shared_harness, OVERRUN_SECONDS, WORKER_PREFETCH_MULTIPLIER="4")
    found = {}
    for case, (pool, _) in OVERRUNS.items():
        size = "1" if pool == "solo" else "2"
        worker = stack.worker(WORKER_POOL=pool, WORKER_CONCURRENCY=size, WORKER_QUEUES=f"over-{case}")
        found[case] = Stopped(stack, worker, f"over-{case}")
    for one in found.values():
        one.worker.ready()
        one.postpone()
    for case, one in found.items():
        pool, task = OVERRUNS[case]
        one.send(task, "endless", ENDLESS)
        shared_harness.wait_started(one.label("endless"))
        if pool != "solo":
            one.send("hold", "short")
            shared_harness.wait_started(one.label("short"))
        one.worker.process.terminate()
        one.worker.says(STOPS)
        shared_harness.release(one.label("short"))
    for one in found.values():
        one.leave()
    return found


@pytest.mark.parametrize("case", OVERRUNS)
def test_a_task_that_still_runs_goes_back_to_its_queue_at_once(overrun: dict[str, Stopped], case: str) -> None:
    one = overrun[case]
    (_, pid, began), *more = one.stack.harness.notes("start", one.label("endless"))

    one.check("endless")
    assert more == []
    assert one.left - began > OVERRUN_SECONDS
    # Nobody goes on with it beside its second start.
    assert command_line(pid) == ""
    assert one.stack.harness.ended(one.label("short")) == (0 if OVERRUNS[case][0] == "solo" else 1)


def test_the_next_worker_runs_what_was_handed_back(overrun: dict[str, Stopped]) -> None:
    stack = overrun["solo"].stack
    queues = [one.queue for one in overrun.values()]
    labels = [one.label("endless") for one in overrun.values()]

    worker = stack.worker(WORKER_POOL="threads", WORKER_CONCURRENCY=str(len(queues)), WORKER_QUEUES=",".join(queues))

    stack.harness.wait_until(
        lambda: [stack.harness.started(label) for label in labels] == [2] * len(labels),
        TIMEOUT_SECONDS,
        "each runs again",
    )
    worker.process.end()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_that_arrives_during_a_stop_is_not_lost(harness: Harness, pool: str) -> None:
    """Redis may have handed it to a worker that reads no more: it stops, or its main thread is a solo pool at work."""
    stack = stopping(harness, SOFT_SHUTDOWN)
    worker = stack.celery(f"worker --pool={pool} --concurrency=2 --hostname=node0@%h --loglevel=debug").ready()
    # Started by its ETA, the solo task leaves a BRPOP behind that waits for the next one. That ends each second,
    # as the countdown must not.
    stack.send("probe.rest", "endless", ENDLESS, countdown=1.3 if pool == "solo" else None)
    harness.wait_started("endless")
    worker.process.terminate()
    worker.says(STOPS)
    if pool == "threads":
        # Wakes the main loop, so that it ends while its BRPOP waits.
        stack.client.control.broadcast("ping")
        # A busy machine may get there after the time to stop.
        worker.says("Canceling task consumer|goes back to its queue")
    stack.send("probe.mark", "late")

    assert worker.exits(TIMEOUT_SECONDS) == 0
    assert sorted(texts(stack, "celery")) == [f"('endless', {ENDLESS})", "('late',)"]
    assert stack.unacked() == 0


def tell(stack: Stack) -> None:
    """By remote control, as Flower does; it is answered."""
    [answer] = stack.client.control.broadcast("shutdown", reply=True, limit=1, timeout=TIMEOUT_SECONDS)
    assert all("ok" in reply for reply in answer.values())


# HUP comes from somebody who wants the node to begin anew; the task raises WorkerShutdown.
STOPS_OF: dict[str, Callable[[Stack], Any]] = {
    "remote control": tell,
    "HUP": lambda stack: stack.nodes[0].process.signal(signal.SIGHUP),
    "a task": lambda stack: stack.send("odd_tasks.end_with", "last", "shutdown"),
}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("stop", STOPS_OF)
def test_what_overruns_goes_back_whoever_stops_the_node(harness: Harness, tmp_path: Path, pool: str, stop: str) -> None:
    harness.checkout = odd_checkout(tmp_path / "code")
    stack = stopping(harness, SOFT_SHUTDOWN, CELERY_IMPORTS="probe,odd_tasks")
    worker = stack.celery(f"worker --pool={pool} --concurrency=2 --hostname=node0@%h --loglevel=info").ready()
    client = stack.redis.client()
    harness.wait_until(client.pubsub_numpat, TIMEOUT_SECONDS, "the node hears commands")
    stack.send("probe.rest", "endless", ENDLESS)
    harness.wait_started("endless")
    STOPS_OF[stop](stack)

    assert worker.exits(TIMEOUT_SECONDS) == 0
    assert texts(stack, "celery") == [f"('endless', {ENDLESS})"]
    assert stack.unacked() == 0


def test_a_program_goes_on_after_a_worker_that_it_had_inside(harness: Harness) -> None:
    """As tests have one. The next worker's task is running when the time of the first one's tasks is over."""
    stack = stopping(harness, SOFT_SHUTDOWN)

    done = harness.answer(["-c", INSIDE, str(2 * SOFT_SHUTDOWN)], stack.environment(), TIMEOUT_SECONDS)

    assert done.returncode == WENT_ON, done.stdout + done.stderr
    assert stack.harness.ended("second") == 1
