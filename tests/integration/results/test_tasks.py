"""Tasks on real workers: each pool, the shipped examples, tasks of the user's own, and what is not let in."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from uuid import uuid4

import pytest

from services.supervisor.proc_stat import read_stat
from services.worker.memory import CHILD_OOM_SCORE_ADJ, LARGEST_OOM_SCORE_ADJ, OOM_SCORE_ADJ
from tests.support.world import Stack, World

POOLS = ("prefork", "threads", "solo")
PATIENCE = 120


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


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_returns_its_result_through_each_pool(stack: Stack, pool: str) -> None:
    result = stack.send("services.tasks.arithmetic.add", 4, 3, queue=pool)

    assert result.get(timeout=PATIENCE) == 7


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_that_raises_fails_with_its_error_in_each_pool(stack: Stack, pool: str) -> None:
    result = stack.send("services.tasks.primes.count_primes", -1, queue=pool)

    with pytest.raises(ValueError, match="limit must be from 0"):
        result.get(timeout=PATIENCE)


@pytest.mark.skipif(not OOM_SCORE_ADJ.exists(), reason="only Linux chooses by this number whom to kill")
@pytest.mark.parametrize(("pool", "more"), [("prefork", CHILD_OOM_SCORE_ADJ), ("threads", 0), ("solo", 0)])
def test_a_child_goes_before_its_node_when_there_is_no_memory_left(stack: Stack, pool: str, more: int) -> None:
    stack.send("probe.mark", f"adjusted-{pool}", queue=pool).get(timeout=PATIENCE)

    ((_, process, _),) = stack.world.notes("start", f"adjusted-{pool}")
    node = parent(process) if pool == "prefork" else process
    own = int(OOM_SCORE_ADJ.read_text())
    assert (oom_score_adj(node), oom_score_adj(process)) == (own, min(LARGEST_OOM_SCORE_ADJ, own + more))


def oom_score_adj(process: int) -> int:
    """What the kernel adds to the size of a process when it looks for one to kill."""
    return int(Path(f"/proc/{process}/oom_score_adj").read_text())


def parent(process: int) -> int:
    """The process that has started this one."""
    stat = read_stat(process)
    assert stat
    return stat.parent


def test_a_workflow_counts_words_in_parallel_and_merges_them(stack: Stack) -> None:
    result = stack.send("services.tasks.words.count_words", ["to be or not", "to be", "or"])

    assert result.get(timeout=PATIENCE) == {"be": 2, "or": 2, "to": 2, "not": 1}


def test_a_long_task_reports_its_progress(stack: Stack) -> None:
    rounds = 10_000_000
    result = stack.send("services.tasks.hashes.hash_chain", "seed", rounds)

    info = stack.world.wait_until(
        lambda: result.info if result.state == "PROGRESS" else None, PATIENCE, "the task reports progress"
    )

    assert info["total"] == rounds
    assert 0 < info["done"] < rounds
    stack.client.control.revoke(result.id, terminate=True)
    stack.world.wait_until(lambda: result.state == "REVOKED", PATIENCE, "the long task is ended")


def test_a_module_named_by_celery_imports_is_found(stack: Stack) -> None:
    assert stack.send("probe.mark", "own").get(timeout=PATIENCE) == "own"


def test_a_pickled_message_is_refused_and_never_unpickled(stack: Stack, tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"
    arguments = pickle.dumps(((Trap(trap),), {}, {}))
    stack.redis.client().lpush("celery", message("probe.mark", arguments))

    worker = stack.world.wait_until(
        lambda: [node for node in stack.nodes if node.process.count("ContentDisallowed")],
        PATIENCE,
        "a worker refuses it",
    )

    assert not trap.exists()
    # The worker that refused it goes on.
    assert stack.send("probe.mark", "after the pickle").get(timeout=PATIENCE) == "after the pickle"
    assert len(worker) == 1
    assert not trap.exists()


class Trap:
    """Whoever unpickles it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self._path, "unpickled")


def message(task: str, body: bytes) -> str:
    """A message as kombu would write it for a producer that pickles."""
    identity = str(uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "binary",
            "content-type": "application/x-python-serialize",
            "headers": {
                "lang": "py",
                "task": task,
                "id": identity,
                "root_id": identity,
                "argsrepr": "",
                "kwargsrepr": "",
            },
            "properties": {
                "correlation_id": identity,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "celery"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )
