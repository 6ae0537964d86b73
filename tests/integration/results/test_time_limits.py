"""Time limits: what a task, a call or an operator gives replaces the pair that all tasks have, and is enforced."""

import http.client
import os
import re
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import TimeLimitExceeded

from tests.support.harness import Harness, Node, Stack
from tests.support.ports import free_port
from tests.support.served_flower import LOGIN, Answer, basic
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

# The limits of all tasks: so soon that a test can wait for them, and further apart than a busy machine pauses: a pool
# that finds both due at the same look kills without the soft one.
SOFT, HARD = 2, 10
# The pools that enforce none.
IN_PROCESS = POOLS[1:]
READY = r"\S+@\S+ ready\."


@pytest.fixture(scope="module")
def stack(odd_world: Harness) -> Stack:
    """A node of each pool, on the queue of its name and with that name."""
    stack = odd_world.stack(
        CELERY_IMPORTS="probe,odd_tasks",
        CELERY_TASK_SOFT_TIME_LIMIT=str(SOFT),
        CELERY_TASK_TIME_LIMIT=str(HARD),
    )
    for pool in POOLS:
        start(stack, pool, f"--pool {pool} --concurrency {len(CASES) if pool == 'prefork' else 1}")
    for node in stack.nodes:
        node.says(READY)
    return stack


def start(stack: Stack, name: str, options: str) -> Node:
    return stack.celery(f"worker --queues {name} --hostname {name}@%h --loglevel info {options}")


def node_name(queue: str) -> str:
    return f"{queue}@{os.uname().nodename}"


def send(stack: Stack, task: str, label: str, queue: str = "prefork", **limits: Any) -> Any:
    return stack.send(f"odd_tasks.{task}", label, queue=queue, **limits)


def soft_limits(stack: Stack, label: str) -> int:
    """How often a soft limit came to a task."""
    return len(stack.harness.notes("soft", label))


# Task, limits of the call, and what the worker's log says of the limit that comes.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "none": ("limitless", {}, f"Soft time limit ({SOFT}s)"),
    "a soft one of the task": ("soft_alone", {}, "Soft time limit (3s)"),
    "a soft one of the call": ("limitless", {"soft_time_limit": 1}, "Soft time limit (1s)"),
    "both of the call": ("limitless", {"soft_time_limit": 1, "time_limit": 30}, "Soft time limit (1s)"),
    "a hard one of the call": ("limitless", {"time_limit": 1}, "Hard time limit (1s)"),
    "a hard one of the call for one of the task": ("hard_alone", {"time_limit": 1}, "Hard time limit (1s)"),
    # A soft limit that is not below the hard one never comes.
    "a soft one of the task above": ("soft_alone", {"time_limit": 1}, "Hard time limit (1s)"),
    "a soft one of the call above": ("limitless", {"soft_time_limit": 9, "time_limit": 1}, "Hard time limit (1s)"),
    # As long after the soft one as for all tasks.
    "one that does not end": ("stubborn", {}, f"Hard time limit ({1 + HARD - SOFT}s)"),
}


@pytest.fixture(scope="module")
def sent(stack: Stack) -> dict[str, Any]:
    """All of them, side by side."""
    return {case: send(stack, task, case.replace(" ", "-"), **limits) for case, (task, limits, _) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_limit_that_was_given_comes(stack: Stack, sent: dict[str, Any], case: str) -> None:
    (task, _, log), label, result = CASES[case], case.replace(" ", "-"), sent[case]

    if log.startswith("Soft"):
        result.get(timeout=TIMEOUT_SECONDS)
        assert soft_limits(stack, label) == 1
    else:
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=TIMEOUT_SECONDS)
        assert soft_limits(stack, label) == 0
    stack.nodes[0].says(rf"{re.escape(log)} exceeded for odd_tasks\.{task}\[{result.id}\]")
    assert stack.harness.started(label) == 1


# Tasks with a longer limit, by what a call gives.
LONGER: dict[str, dict[str, Any]] = {"hard_alone": {}, "soft_beyond": {}, "limitless": {"time_limit": 7200}}


def test_a_task_with_a_longer_limit_runs_on_after_that_of_all_tasks(stack: Stack) -> None:
    running = {task: send(stack, task, f"long-{task}", **limits) for task, limits in LONGER.items()}
    for task in running:
        stack.harness.wait_started(f"long-{task}")
    # It starts after them, so that its limits come after the same limits would have come to them.
    with pytest.raises(TimeLimitExceeded):
        send(stack, "stubborn", "measure", soft_time_limit=SOFT, time_limit=HARD).get(timeout=TIMEOUT_SECONDS)

    for task, result in running.items():
        assert (soft_limits(stack, f"long-{task}"), stack.harness.started(f"long-{task}")) == (0, 1), task
        assert result.state == "PENDING", task


def test_a_child_that_is_killed_as_its_task_ends_does_not_stop_its_node(stack: Stack) -> None:
    """Such a death is a matter of chance: here the child leaves behind what it would, a lock."""
    start(stack, "locked", "--pool prefork --concurrency 1").says(READY)

    assert send(stack, "lock_counter", "locks", queue="locked").get(timeout=TIMEOUT_SECONDS) == "locks"
    assert send(stack, "quick", "behind", queue="locked").get(timeout=TIMEOUT_SECONDS) == "behind"


@pytest.mark.parametrize("pool", IN_PROCESS)
def test_a_pool_that_enforces_no_limits_says_so_at_its_start(stack: Stack, pool: str) -> None:
    node = stack.nodes[1 + IN_PROCESS.index(pool)]

    node.says(r"time limits are not enforced in this pool.*odd_tasks\.hard_alone, odd_tasks\.quick")
    assert send(stack, "quick", f"quick-{pool}", queue=pool).get(timeout=TIMEOUT_SECONDS) == f"quick-{pool}"


def change(stack: Stack, queue: str, *, soft: float | None = None, hard: float | None = None, task: str) -> Any:
    """What the worker of a queue answers to `control.time_limit`."""
    node = node_name(queue)
    [answer] = stack.client.control.time_limit(
        f"odd_tasks.{task}", soft=soft, hard=hard, reply=True, timeout=TIMEOUT_SECONDS, destination=[node], limit=1
    )
    return answer[node]


@pytest.mark.parametrize("task", ["limitless", "hard_alone"])
def test_an_operators_limit_takes_effect_and_is_taken_back(stack: Stack, task: str) -> None:
    """Also for a task whose author's limits come along with each message; a call's own limit goes before it."""
    authored: dict[str, Any] = {"time_limit": 3600} if task == "hard_alone" else {}

    assert change(stack, "prefork", hard=1, task=task) == {"ok": "time limits set successfully"}
    with pytest.raises(TimeLimitExceeded):
        send(stack, task, f"changed-{task}", **authored).get(timeout=TIMEOUT_SECONDS)
    assert send(stack, task, f"called-{task}", soft_time_limit=3, time_limit=30).get(timeout=TIMEOUT_SECONDS)
    assert soft_limits(stack, f"called-{task}") == 1

    assert "ok" in change(stack, "prefork", task=task)
    assert send(stack, task, f"back-{task}").get(timeout=TIMEOUT_SECONDS)
    assert soft_limits(stack, f"back-{task}") == 1


@pytest.mark.parametrize(
    ("queue", "limits", "reason"),
    [
        ("threads", {"hard": 5}, "not enforced in this pool"),
        ("solo", {"soft": 5}, "not enforced in this pool"),
        ("prefork", {"soft": 5, "hard": 5}, r"must be below the hard one"),
        ("prefork", {"hard": -1}, "must be a number of seconds above 0"),
        ("prefork", {"soft": "5"}, "must be a number of seconds above 0"),
    ],
)
def test_a_limit_without_effect_is_refused(stack: Stack, queue: str, limits: dict[str, Any], reason: str) -> None:
    answer = change(stack, queue, task="quick", **limits)

    assert reason in answer["error"]


def test_the_limits_of_all_tasks_are_what_a_node_says_of_its_pool(stack: Stack) -> None:
    inspect = stack.client.control.inspect([node_name("prefork")], timeout=TIMEOUT_SECONDS, limit=1)
    [stats] = inspect.stats().values()

    assert stats["pool"]["timeouts"] == [SOFT, HARD]


def test_limits_on_the_command_line_are_those_of_all_tasks(stack: Stack) -> None:
    node = start(stack, "by-hand", "--concurrency 1 --time-limit 1").says(READY)

    with pytest.raises(TimeLimitExceeded):
        send(stack, "limitless", "by-hand", queue="by-hand").get(timeout=TIMEOUT_SECONDS)

    node.says(r"Hard time limit \(1(\.0)?s\) exceeded")
    assert soft_limits(stack, "by-hand") == 0


def test_a_limit_that_is_set_in_flower_takes_effect_or_is_refused_and_one_of_its_own_can_be_sent(stack: Stack) -> None:
    """Flower as it is launched, which knows the stack's nodes and tasks."""
    port, database = free_port(), stack.harness.path("flower.db")
    command = f"-m services.launch flower --address 127.0.0.1 --port {port} --database {database}"
    process = stack.harness.python("flower", command, stack.environment(FLOWER_BASIC_AUTH=LOGIN))

    def ask(path: str, method: str = "POST", body: str | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
        connection.request(method, path, body, {"Authorization": basic(LOGIN)})
        return Answer(connection.getresponse())

    def knows_all() -> bool:
        assert process.alive, process.tail()
        with suppress(ConnectionRefusedError):
            return bool(set(map(node_name, POOLS)) <= ask("/api/workers", "GET").json.keys())
        return False

    def press(pool: str, limits: str, text: str) -> Answer:
        """Ask until the node replies: Flower waits for a second, in which a node on a busy machine does not."""
        path = f"/api/task/timeout/odd_tasks.quick?workername={node_name(pool)}&{limits}"

        def pressed() -> Answer | None:
            answer = ask(path)
            return answer if text in answer.text else None

        return stack.harness.wait_until(pressed, TIMEOUT_SECONDS, f"the {pool} node says {text!r}")

    stack.harness.wait_until(knows_all, TIMEOUT_SECONDS, "Flower knows the nodes")
    accepted = press("prefork", "soft=2&hard=3", "time limits set successfully")
    not_enforced = press("threads", "soft=2&hard=3", "not enforced in this pool")
    reversed_ = press("prefork", "soft=3&hard=2", "must be below the hard one")
    sent = {
        name: ask(f"/api/task/async-apply/odd_tasks.{name}", body=f'{{"args": ["from-flower"], "queue": "{queue}"}}')
        for name, queue in {"hard_alone": "unread", "soft_beyond": "unread", "quick": "prefork"}.items()
    }

    assert (accepted.status, accepted.json) == (200, {"message": "time limits set successfully"})
    assert [answer.status for answer in (not_enforced, reversed_)] == [403, 403]
    assert {name: answer.status for name, answer in sent.items()} == dict.fromkeys(sent, 200)
    assert stack.waiting("unread") == 2
    stack.harness.wait_started("from-flower")
