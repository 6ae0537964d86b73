"""python -m services status: what `make status` shows."""

from __future__ import annotations

import os

import pytest

from tests.integration.test_call import Answer, services
from tests.support.world import Stack, World

PATIENCE = 120
# Longer than the tests of this module take.
ENDLESS = 600
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def stack(shared_world: World) -> Stack:
    """A worker at work, tasks that wait, and a beat."""
    stack = shared_world.stack(BEAT_SCHEDULE="report-free-space=off")
    worker = stack.worker(WORKER_POOL="threads", WORKER_CONCURRENCY="2", WORKER_QUEUES="celery,mail")
    beat = stack.beat()
    worker.ready()
    beat.says("beat: ticking")
    stack.send("probe.rest", "running", ENDLESS)
    shared_world.wait_until(lambda: shared_world.started("running"), PATIENCE, "the task runs")
    for priority in (0, 3, 9):
        stack.send("probe.mark", "waits", queue="elsewhere", priority=priority)
    return stack


def test_nodes_queues_and_beat_are_shown(stack: Stack) -> None:
    def shown() -> Answer | None:
        # A node has a second to answer each question; on a busy machine that may not be enough.
        answer = services(stack, "status")
        node = answer.said["nodes"].get(f"node0@{HOST}", {})
        return answer if node.get("running") and node.get("queues") else None

    answer = stack.world.wait_until(shown, PATIENCE, "the node in the status")

    assert answer.code == 0
    ((name, node),) = answer.said["nodes"].items()
    assert name == f"node0@{HOST}"
    assert (node["pool"], node["concurrency"], node["queues"]) == ("threads", 2, ["celery", "mail"])
    assert [task["name"] for task in node["running"]] == ["probe.rest"]
    # Every priority counts, and a queue that no worker here listens on.
    assert answer.said["queues"] == {"celery": 0, "elsewhere": 3, "mail": 0}
    assert answer.said["unacked"] == 1
    assert 0 <= answer.said["beat"]["seconds_since_tick"] < PATIENCE
    assert answer.errors == ""


def test_whoever_asks_all_nodes_goes_on_when_all_have_answered(stack: Stack) -> None:
    assert ask_all(stack) == f"['node0@{HOST}']\n"


def test_whoever_asks_where_there_is_no_node_goes_on_at_once(world: World) -> None:
    assert ask_all(world.stack()) == "[]\n"


def ask_all(stack: Stack) -> str:
    """Ask all nodes, with much more patience than this waits for the answers; the names of those that answer."""
    asks = f"print(list(app.control.inspect(timeout={100 * PATIENCE}).ping() or []))"
    asking = stack.world.python("ask", f'-c "from services.app import app; {asks}"', stack.environment())
    stack.world.wait_until(lambda: not asking.alive, 4 * PATIENCE, "answers come long before their time is over")
    return asking.log()


def test_an_empty_stack_is_shown(world: World) -> None:
    answer = services(world.stack(), "status")

    assert answer.code == 0
    assert answer.said == {
        "nodes": {},
        "queues": {"celery": 0},
        "unacked": 0,
        "scheduled": 0,
        "dead_letters": 0,
        "beat": {"seconds_since_tick": None},
    }


def test_a_redis_that_is_away_is_said_with_exit_code_1(world: World) -> None:
    stack = world.stack()
    stack.redis.stop()

    answer = services(stack, "status")

    assert answer.code == 1
    assert answer.said["error"].startswith("Redis does not answer")
