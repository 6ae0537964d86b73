"""python -m services status: what `make status` shows."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from services.broker.keys import get_lists
from tests.integration.commands.test_call import Answer, services
from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS

NODE = f"node0@{os.uname().nodename}"
EMPTY = {
    "nodes": {},
    "silent_nodes": 0,
    "queues": {"celery": 0},
    "unread": [],
    "overtime": [],
    "unacked": 0,
    "scheduled": 0,
    "dead_letters": 0,
    "beat": {"seconds_since_tick": None},
}


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A worker at work, tasks that wait, and a beat."""
    stack = shared_harness.stack(BEAT_SCHEDULE="report-free-space=off")
    worker = stack.worker(WORKER_POOL="threads", WORKER_CONCURRENCY="2", WORKER_QUEUES="celery,mail")
    beat = stack.beat()
    worker.ready()
    beat.says("beat: ticking")
    stack.send("probe.hold", "running")
    shared_harness.wait_started("running")
    for priority in (0, 3, 9):
        stack.send("probe.mark", "waits", queue="elsewhere", priority=priority)
    return stack


def test_nodes_queues_and_beat_are_shown(stack: Stack) -> None:
    def is_whole(answer: Answer) -> bool:
        node = answer.data["nodes"].get(NODE, {})
        return bool(node.get("running") and node.get("queues"))

    answer = status(stack, is_whole)

    assert (answer.code, answer.errors) == (0, "")
    ((name, node),) = answer.data["nodes"].items()
    assert name == NODE
    assert (node["pool"], node["concurrency"], node["queues"]) == ("threads", 2, ["celery", "mail"])
    assert [task["name"] for task in node["running"]] == ["probe.hold"]
    # Every priority counts, and a queue that no worker here listens on.
    assert answer.data["queues"] == {"celery": 0, "elsewhere": 3, "mail": 0}
    assert answer.data["unread"] == [waits("elsewhere", priority) for priority in (0, 3, 9)]
    assert (answer.data["silent_nodes"], answer.data["overtime"], answer.data["unacked"]) == (0, [], 1)
    assert 0 <= answer.data["beat"]["seconds_since_tick"] < TIMEOUT_SECONDS


def status(stack: Stack, is_whole: Callable[[Answer], bool]) -> Answer:
    """The status, once it is so: a node has a second to answer each question, too little on a busy machine."""

    def look() -> Answer | None:
        answer = services(stack, "status")
        return answer if is_whole(answer) else None

    return stack.harness.wait_until(look, TIMEOUT_SECONDS, "the status")


def waits(queue: str, priority: int = 0, count: int = 1) -> dict[str, Any]:
    return {"queue": queue, "priority": priority, "waiting": count}


def stock_producer(stack: Stack) -> Celery:
    """A Celery that is not Stalk's, with a list for each priority."""
    app = Celery("stock", broker=stack.client.conf.broker_url, set_as_current=False)
    app.conf.broker_transport_options = {"priority_steps": list(range(10))}
    return app


def unread(stack: Stack) -> list[dict[str, Any]]:
    """What no node reads, as soon as each node has said what it reads."""
    return list(status(stack, all_answer).data["unread"])


def all_answer(answer: Answer) -> bool:
    return answer.code == 0 and not answer.data["silent_nodes"]


# Lists of other programs: text, bytes, JSON, the part of a chord, and a message that is no task.
NO_QUEUES: dict[str, bytes] = {
    "shop:text": b"milk",
    "shop:bytes": b"\xff\x00",
    "shop:json": b'{"x": 1}',
    "shop:part": b'[1, "id", "SUCCESS", 7]',
    "shop:message": b'{"headers": {}, "properties": {}, "body": "{}"}',
}


def test_lists_with_tasks_that_no_node_reads_are_shown_with_their_number_and_no_others(stack: Stack) -> None:
    """A priority between those that nodes read, and a queue that nobody has declared."""
    client, before = stack.redis.client(), unread(stack)
    for key, content in NO_QUEUES.items():
        client.lpush(key, content)
    with stock_producer(stack) as producer:
        for priority in (1, 1, 3, 8):
            producer.send_task("probe.mark", ("between",), priority=priority)
        producer.send_task("probe.mark", ("misspelt",), queue="mial")
    oldest = client.lindex("mial", -1)
    assert oldest
    # As a program writes it that knows nothing of kombu's bindings.
    client.lpush("celrey", "{}", oldest)
    client.lmove("celrey", "celrey", "RIGHT", "LEFT")
    try:
        stack.harness.wait_started("between")
        found = unread(stack)

        new = [waits("celery", 1, 2), waits("celery", 8), waits("celrey", 0, 2), waits("mial")]
        assert sorted(found, key=json.dumps) == sorted([*before, *new], key=json.dumps)
        assert stack.harness.started("between") == 1
    finally:
        client.delete("celrey", *get_lists("mial"), *(f"celery\x06\x16{step}" for step in (1, 8)))
        client.delete("_kombu.binding.mial", *NO_QUEUES)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_that_runs_over_its_limit_where_nothing_ends_it_is_shown(harness: Harness, pool: str) -> None:
    stack = harness.stack()
    node = stack.worker(WORKER_POOL=pool, WORKER_LEASE="10").ready()
    late = stack.send("probe.hold", "late", time_limit=1)
    harness.wait_started("late")

    # A solo pool at work answers nobody.
    wanted = (0, 1) if pool == "solo" else (1, 0)

    def is_whole(answer: Answer) -> bool:
        shown = answer.data
        return bool(shown["overtime"]) and (len(shown["nodes"]), shown["silent_nodes"]) == wanted

    overtime = status(stack, is_whole).data["overtime"]

    (one,) = overtime
    assert one.pop("seconds") > 0
    assert one == {"node": NODE, "id": late.id, "name": "probe.hold", "limit": 1}
    node.says(rf"probe\.hold\[{late.id}\] has run for \d+ s and its limit is 1 s")

    harness.release("late")
    late.get(timeout=TIMEOUT_SECONDS)
    status(stack, lambda answer: not answer.data["overtime"])


def test_where_no_node_runs_only_what_none_would_read_is_unread(harness: Harness) -> None:
    stack = harness.stack()
    assert status(stack, all_answer).data == EMPTY

    with stock_producer(stack) as producer:
        for queue, priority in (("celery", 0), ("celery", 1), ("elsewhere", 9)):
            producer.send_task("probe.mark", ("waits",), queue=queue, priority=priority)

    assert status(stack, all_answer).data == {
        **EMPTY,
        "queues": {"celery": 1, "elsewhere": 1},
        "unread": [waits("celery", 1)],
    }


def test_whoever_asks_all_nodes_goes_on_when_all_have_answered_or_there_is_none(stack: Stack, harness: Harness) -> None:
    assert ask_all(stack) == f"['{NODE}']\n"
    assert ask_all(harness.stack()) == "[]\n"


def ask_all(stack: Stack) -> str:
    """Ask all nodes, with a timeout much longer than this waits for the answers; the names of those that answer."""
    asks = f"print(list(app.control.inspect(timeout={100 * TIMEOUT_SECONDS}).ping() or []))"
    asking = stack.harness.python("ask", f'-c "from services.app import app; {asks}"', stack.environment())
    stack.harness.wait_until(
        lambda: not asking.alive, 4 * TIMEOUT_SECONDS, "answers come long before their time is over"
    )
    return asking.log()
