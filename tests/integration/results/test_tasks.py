"""Tasks on real workers: the shipped examples, and tasks that end with all kinds of errors, once and in every pool."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import ChordError

from services.supervisor.proc_stat import read_stat
from services.worker.memory import CHILD_OOM_SCORE_ADJ, LARGEST_OOM_SCORE_ADJ, OOM_SCORE_ADJ
from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, start_workers, wait_acknowledged

# How it ends → the class and the message that clients, logs and pages have to show.
ERRORS = {
    "exit": ("SystemExit", "no more"),
    "exit-0": ("SystemExit", "0"),
    "interrupt": ("KeyboardInterrupt", "pressed"),
    "cancelled": ("CancelledError", "by a loop"),
    "own": ("OwnError", "something"),
    "spoken": ("SpokenError", "code 7"),
    "generator": ("GeneratorExit", "closed"),
    "memory": ("MemoryError", "too much"),
    "value": ("ValueError", "plain"),
}


@pytest.fixture(scope="module")
def stack(odd_world: Harness) -> Stack:
    """A worker of each pool, on the queue of its name, and one for the default queue."""
    stack = odd_world.stack(CELERY_IMPORTS="probe,odd_tasks", CELERY_TASK_TIME_LIMIT="600")
    start_workers(stack)
    stack.worker().ready()
    return stack


def wait_failed(stack: Stack, result: Any) -> dict[str, Any]:
    """Wait until a task has failed; return what is stored of it."""
    stack.harness.wait_until(lambda: result.state == "FAILURE", TIMEOUT_SECONDS, f"{result.id} fails")
    meta: dict[str, Any] = stack.client.backend._get_task_meta_for(result.id)
    return meta


@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_task_fails_once_with_its_error_and_its_hook_is_called(stack: Stack, pool: str, how: str) -> None:
    label = f"{pool}-{how}"
    name, text = ERRORS[how]

    result = stack.send("odd_tasks.end_hooked", label, how, queue=pool)

    meta = wait_failed(stack, result)
    assert type(meta["result"]).__name__ == name
    # A client gets the error itself, where Python has it.
    assert how != "cancelled" or isinstance(meta["result"], asyncio.CancelledError)
    assert text in str(meta["result"])
    assert "in end_hooked" in meta["traceback"]
    stack.nodes[POOLS.index(pool)].says(rf"odd_tasks\.end_hooked\[{result.id}\] raised unexpected: {name}\(")
    # What was sent after it runs on the same node: nothing has ended with it.
    assert stack.send("probe.mark", f"{label}-after", queue=pool).get(timeout=TIMEOUT_SECONDS) == f"{label}-after"
    assert (stack.harness.started(label), len(stack.harness.notes(f"hook-{name}", label))) == (1, 1)
    wait_acknowledged(stack)


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_exits_in_a_hook_fails_once_and_one_that_is_called_raises(stack: Stack, pool: str) -> None:
    meta = wait_failed(stack, stack.send("odd_tasks.end_in_hook", f"{pool}-before", queue=pool))
    calls = stack.send("odd_tasks.call_inside", f"{pool}-calls", queue=pool)

    assert (type(meta["result"]).__name__, str(meta["result"])) == ("SystemExit", "before it began")
    assert calls.get(timeout=TIMEOUT_SECONDS) == "exit no more"
    assert stack.harness.started(f"{pool}-before") == 1


@pytest.mark.parametrize("how", ["shutdown", "terminate"])
def test_a_task_that_stops_its_node_fails_and_stops_no_other(stack: Stack, how: str) -> None:
    """If it were requeued, it would stop the next node that runs it."""
    wait_acknowledged(stack)
    nodes, sent = [], []
    for pool in POOLS:
        queue = f"{how}-{pool}"
        nodes.append(stack.celery(f"worker -P {pool} -Q {queue} -n {queue}@%h -c 1 -l info"))
        sent.append(stack.send("odd_tasks.end_with", queue, how, queue=queue))
    for node, result in zip(nodes, sent, strict=True):
        assert type(wait_failed(stack, result)["result"]).__name__ == f"Worker{how.capitalize()}"
        node.exits(TIMEOUT_SECONDS)
    assert [stack.harness.started(f"{how}-{pool}") for pool in POOLS] == [1, 1, 1]
    assert (stack.unacked(), [stack.waiting(f"{how}-{pool}") for pool in POOLS]) == (0, [0, 0, 0])


def test_a_task_whose_child_process_is_terminated_runs_again(stack: Stack) -> None:
    """The signal raises SystemExit in the task; that is the end of a process, and counts."""
    result = stack.send("probe.hold", "left", queue="prefork")
    stack.harness.wait_started("left")
    [(_, child, _)] = stack.harness.notes("start", "left")

    os.kill(child, signal.SIGTERM)

    stack.harness.wait_until(lambda: stack.harness.started("left") == 2, TIMEOUT_SECONDS, "it is started again")
    stack.harness.release("left")
    assert result.get(timeout=TIMEOUT_SECONDS) == "left"


@pytest.mark.skipif(not OOM_SCORE_ADJ.exists(), reason="only Linux chooses by this number what to kill")
@pytest.mark.parametrize(("pool", "more"), [("prefork", CHILD_OOM_SCORE_ADJ), ("threads", 0), ("solo", 0)])
def test_a_child_goes_before_its_node_when_there_is_no_memory_left(stack: Stack, pool: str, more: int) -> None:
    stack.send("probe.mark", f"adjusted-{pool}", queue=pool).get(timeout=TIMEOUT_SECONDS)

    ((_, process, _),) = stack.harness.notes("start", f"adjusted-{pool}")
    stat = read_stat(process)
    assert stat
    node = stat.parent if pool == "prefork" else process
    own = int(OOM_SCORE_ADJ.read_text())
    assert (oom_score_adj(node), oom_score_adj(process)) == (own, min(LARGEST_OOM_SCORE_ADJ, own + more))


def oom_score_adj(process: int) -> int:
    """What the kernel adds to the size of a process when it looks for one to kill."""
    return int(Path(f"/proc/{process}/oom_score_adj").read_text())


WORDS = {"one document": {"document": 1, "one": 1}, "to be or not, to be, or": {"be": 2, "or": 2, "to": 2, "not": 1}}


@pytest.mark.parametrize("text", ["", *WORDS])
def test_a_workflow_counts_words_in_parallel_and_merges_them(stack: Stack, text: str) -> None:
    result = stack.send("services.tasks.words.count_words", text.split(", ") if text else [])

    assert result.get(timeout=TIMEOUT_SECONDS) == WORDS.get(text, {})


def test_a_workflow_fails_with_a_document_that_cannot_be_counted(stack: Stack) -> None:
    with pytest.raises(ChordError):
        stack.send("services.tasks.words.count_words", ["fine", None]).get(timeout=TIMEOUT_SECONDS)


def test_a_long_task_reports_its_progress(stack: Stack) -> None:
    rounds = 10_000_000
    result = stack.send("services.tasks.hashes.hash_chain", "seed", rounds)

    info = stack.harness.wait_until(
        lambda: result.info if result.state == "PROGRESS" else None, TIMEOUT_SECONDS, "the task reports progress"
    )

    assert info["total"] == rounds
    assert 0 < info["done"] < rounds
    stack.client.control.revoke(result.id, terminate=True)
    stack.harness.wait_until(lambda: result.state == "REVOKED", TIMEOUT_SECONDS, "the long task is ended")
