"""Tasks on real workers: the shipped examples, tasks of the user's own, and what is not let in."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery.exceptions import ChordError

from services.supervisor.proc_stat import read_stat
from services.worker.memory import CHILD_OOM_SCORE_ADJ, LARGEST_OOM_SCORE_ADJ, OOM_SCORE_ADJ
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS
from tests.support.world import Stack, World


@pytest.fixture(scope="module")
def stack(shared_world: World) -> Stack:
    """A worker for each pool, listening on the queue of its name; prefork's also takes the default queue."""
    stack = shared_world.stack()
    workers = [
        stack.worker(WORKER_POOL=pool, WORKER_QUEUES=f"{pool},celery" if pool == "prefork" else pool) for pool in POOLS
    ]
    for worker in workers:
        worker.ready()
    return stack


@pytest.mark.skipif(not OOM_SCORE_ADJ.exists(), reason="only Linux chooses by this number what to kill")
@pytest.mark.parametrize(("pool", "more"), [("prefork", CHILD_OOM_SCORE_ADJ), ("threads", 0), ("solo", 0)])
def test_a_child_goes_before_its_node_when_there_is_no_memory_left(stack: Stack, pool: str, more: int) -> None:
    stack.send("probe.mark", f"adjusted-{pool}", queue=pool).get(timeout=TIMEOUT_SECONDS)

    ((_, process, _),) = stack.world.notes("start", f"adjusted-{pool}")
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

    info = stack.world.wait_until(
        lambda: result.info if result.state == "PROGRESS" else None, TIMEOUT_SECONDS, "the task reports progress"
    )

    assert info["total"] == rounds
    assert 0 < info["done"] < rounds
    stack.client.control.revoke(result.id, terminate=True)
    stack.world.wait_until(lambda: result.state == "REVOKED", TIMEOUT_SECONDS, "the long task is ended")
