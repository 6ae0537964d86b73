"""Workers of each pool, and waits for what their tasks do."""

from collections.abc import Collection, Iterable

from tests.support.harness import Node, Stack
from tests.support.waiting import TIMEOUT_SECONDS

POOLS = ("prefork", "threads", "solo")


def start_workers(stack: Stack, room: int = 1) -> dict[str, Node]:
    """Start a worker of each pool, for so many tasks at a time, on the queue of its name; wait until all are ready."""
    workers = {}
    for pool in POOLS:
        # A solo node runs one task at a time.
        setting = "WORKER_PROCESSES" if pool == "solo" else "WORKER_CONCURRENCY"
        workers[pool] = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool, **{setting: str(room)})
    for pool, worker in workers.items():
        worker.ready(room if pool == "solo" else 1)
    return workers


def wait_running(stack: Stack, labels: Iterable[str]) -> None:
    """Wait until the tasks with these labels run."""
    for label in labels:
        stack.harness.wait_started(label)


def release(stack: Stack, labels: Collection[str]) -> None:
    """Let these tasks end, and wait until they have."""
    stack.harness.release(*labels)
    stack.harness.wait_until(lambda: all(map(stack.harness.ended, labels)), TIMEOUT_SECONDS, f"{[*labels]} have ended")


def wait_acknowledged(stack: Stack) -> None:
    stack.harness.wait_until(lambda: stack.unacked() == 0, TIMEOUT_SECONDS, "all are acknowledged")


def stop(node: Node) -> int:
    """Tell it to stop, as Docker and Supervisor do; its exit code."""
    node.process.terminate()
    return node.exits(TIMEOUT_SECONDS)
