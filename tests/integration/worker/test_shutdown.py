"""TERM: running tasks finish, what cannot finish in time goes back to its queue, in every pool."""

from __future__ import annotations

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
from tests.support.processes import command_line
from tests.support.world import Node, Stack, World

PATIENCE = 120
SOFT_SHUTDOWN = 2
# Time for a busy machine to end a task after a worker has been told to stop.
OVERRUN_SECONDS = 10
HOUR = 3600
# Longer than any test waits: such a task never comes to its end.
ENDLESS = 600
# A node says so when TERM has reached it.
STOPS = "Warm shutdown"
POOLS = ("prefork", "threads", "solo")
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
    result.get(timeout={PATIENCE}, disable_sync_subtasks=False)
    state.should_stop = 0
    worker.join({PATIENCE})
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
        self.stack.world.wait_until(lambda: self.scheduled() == 1, PATIENCE, f"{self.queue}: the ETA task is put off")

    def scheduled(self) -> int:
        """Messages of its queue that wait in Redis until they are due."""
        return self._of_queue(SCHEDULED_MESSAGES)

    def held(self) -> int:
        """Messages of its queue that the worker holds."""
        return self._of_queue(UNACKED)

    def _of_queue(self, key: str) -> int:
        messages = [json.loads(text) for text in self.stack.redis.client().hvals(key)]
        return sum(1 for _, _, routing_key in messages if routing_key == self.queue)

    def waiting(self) -> list[str]:
        """What the tasks that wait in its queue are called."""
        return sorted(text.removeprefix(f"('{self.queue}-").partition("'")[0] for text in texts(self.stack, self.queue))

    def release(self, what: str) -> None:
        """Let a task end that is held."""
        self.stack.world.release(self.label(what))

    def leave(self) -> None:
        """Wait until the worker has left."""
        self.code, self.left = self.worker.exits(PATIENCE), time()


def texts(stack: Stack, queue: str) -> list[str]:
    """The arguments of the tasks that wait in a queue."""
    return [json.loads(text)["headers"]["argsrepr"] for text in stack.redis.client().lrange(queue, 0, -1)]


def stopping(world: World, seconds: int, **settings: str) -> Stack:
    """A stack whose workers wait for their tasks for so long when they are told to stop."""
    return world.stack(WORKER_SOFT_SHUTDOWN=str(seconds), WORKER_STOP_GRACE_PERIOD=str(seconds + 15), **settings)


@pytest.fixture(scope="module")
def finished(shared_world: World) -> dict[str, Stopped]:
    """A worker of each pool, told twice to stop in the middle of a task that ends in time."""
    # A worker that waits for more than its tasks does so for longer than a test waits.
    stack = stopping(shared_world, ENDLESS, WORKER_PREFETCH_MULTIPLIER="4", LOG_LEVEL="debug")
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
        shared_world.wait_started(one.label("running"))
        one.send("mark", "next")
        one.worker.process.terminate()
    for one in found.values():
        one.worker.says("received SIGTERM").process.terminate()
    for pool, one in found.items():
        # From then on nothing more begins there. The main thread of a solo node runs the task, and looks after it.
        one.worker.says("received SIGTERM", times=2).says(STOPS if pool == "solo" else "Stopping Pool")
        one.release("running")
    for one in found.values():
        one.leave()
    return found


@pytest.mark.parametrize("pool", POOLS)
def test_a_running_task_finishes_and_the_worker_leaves_when_it_has(finished: dict[str, Stopped], pool: str) -> None:
    one = finished[pool]

    assert one.running.get(timeout=PATIENCE) == one.label("running")
    assert len(one.stack.world.notes("end", one.label("running"))) == 1
    assert one.code == 0


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_that_wait_in_a_worker_are_back_on_their_queue_after_a_stop(
    finished: dict[str, Stopped], pool: str
) -> None:
    one = finished[pool]

    assert one.waiting() == ["next"]
    assert (one.held(), one.scheduled()) == (0, 1)
    assert one.stack.world.started(one.label("next")) == 0


@pytest.fixture(scope="module")
def overrun(shared_world: World) -> dict[str, Stopped]:
    """Workers told to stop while a task runs that does not end; another, except in solo, ends in between."""
    stack = stopping(shared_world, OVERRUN_SECONDS, WORKER_PREFETCH_MULTIPLIER="4")
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
        shared_world.wait_started(one.label("endless"))
        if pool != "solo":
            one.send("hold", "short")
            shared_world.wait_started(one.label("short"))
        one.worker.process.terminate()
        one.worker.says(STOPS)
        one.release("short")
    for one in found.values():
        one.leave()
    return found


@pytest.mark.parametrize("case", OVERRUNS)
def test_a_task_that_still_runs_goes_back_to_its_queue_at_once(overrun: dict[str, Stopped], case: str) -> None:
    one = overrun[case]
    (_, pid, began), *more = one.stack.world.notes("start", one.label("endless"))

    assert one.waiting() == ["endless"]
    assert (one.held(), one.scheduled()) == (0, 1)
    assert more == []
    assert one.code == 0
    assert one.left - began > OVERRUN_SECONDS
    # Nobody goes on with it beside its second start.
    assert command_line(pid) == ""


@pytest.mark.parametrize("case", ["prefork", "threads"])
def test_a_task_that_ended_during_the_stop_does_not_run_again(overrun: dict[str, Stopped], case: str) -> None:
    one = overrun[case]

    assert one.stack.world.ended(one.label("short")) == 1
    assert "short" not in one.waiting()
    assert one.held() == 0


def test_the_next_worker_runs_what_was_handed_back(overrun: dict[str, Stopped]) -> None:
    stack = overrun["solo"].stack
    queues = [one.queue for one in overrun.values()]
    labels = [one.label("endless") for one in overrun.values()]

    worker = stack.worker(WORKER_POOL="threads", WORKER_CONCURRENCY=str(len(queues)), WORKER_QUEUES=",".join(queues))

    stack.world.wait_until(
        lambda: [stack.world.started(label) for label in labels] == [2] * len(labels), PATIENCE, "each runs again"
    )
    worker.process.end()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_that_arrives_during_a_stop_is_not_lost(world: World, pool: str) -> None:
    """Redis may have handed it to a worker that reads no more: it stops, or its main thread is a solo pool at work."""
    stack = stopping(world, SOFT_SHUTDOWN)
    worker = stack.celery(f"worker --pool={pool} --concurrency=2 --hostname=node0@%h --loglevel=debug").ready()
    # Started by its ETA, the solo task leaves a BRPOP behind that waits for the next one. That ends each second,
    # as the countdown must not.
    stack.send("probe.rest", "endless", ENDLESS, countdown=1.3 if pool == "solo" else None)
    world.wait_started("endless")
    worker.process.terminate()
    worker.says(STOPS)
    if pool == "threads":
        # Wakes the main loop, so that it ends while its BRPOP waits.
        stack.client.control.broadcast("ping")
        # A busy machine may get there after the time to stop.
        worker.says("Canceling task consumer|goes back to its queue")
    stack.send("probe.mark", "late")

    assert worker.exits(PATIENCE) == 0
    assert sorted(texts(stack, "celery")) == [f"('endless', {ENDLESS})", "('late',)"]
    assert stack.unacked() == 0


def told(stack: Stack) -> None:
    """By remote control, as Flower does; it is answered."""
    [answer] = stack.client.control.broadcast("shutdown", reply=True, limit=1, timeout=PATIENCE)
    assert all("ok" in said for said in answer.values())


def hung_up(stack: Stack) -> None:
    """By HUP, as somebody does who wants it to begin anew."""
    stack.nodes[0].process.signal(signal.SIGHUP)


def asked_by_a_task(stack: Stack) -> None:
    """By a task that raises WorkerShutdown."""
    stack.send("odd_tasks.end_with", "last", "shutdown")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("stop", [told, hung_up, asked_by_a_task])
def test_whoever_stops_a_node_what_overruns_goes_back_to_its_queue(
    world: World, tmp_path: Path, pool: str, stop: Callable[[Stack], None]
) -> None:
    world.checkout = odd_checkout(tmp_path / "code")
    stack = stopping(world, SOFT_SHUTDOWN, CELERY_IMPORTS="probe,odd_tasks")
    worker = stack.celery(f"worker --pool={pool} --concurrency=2 --hostname=node0@%h --loglevel=info").ready()
    client = stack.redis.client()
    world.wait_until(client.pubsub_numpat, PATIENCE, "the node hears commands")
    stack.send("probe.rest", "endless", ENDLESS)
    world.wait_started("endless")
    stop(stack)

    assert worker.exits(PATIENCE) == 0
    assert texts(stack, "celery") == [f"('endless', {ENDLESS})"]
    assert stack.unacked() == 0


def test_a_program_goes_on_after_a_worker_that_it_had_inside(world: World) -> None:
    """As tests have one. The next worker's task is running when the time of the first one's tasks is over."""
    stack = stopping(world, SOFT_SHUTDOWN)

    done = world.answer(["-c", INSIDE, str(2 * SOFT_SHUTDOWN)], stack.environment(), PATIENCE)

    assert done.returncode == WENT_ON, done.stdout + done.stderr
    assert stack.world.ended("second") == 1
