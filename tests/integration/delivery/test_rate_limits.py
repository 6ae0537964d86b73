"""Rate limits: who is over a rate waits in Redis until his token comes, and keeps nobody else from the node."""

import json
import signal
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from time import time
from typing import Any

import pytest

from services.broker import scripts
from services.broker.headroom import Client
from services.broker.keys import RATE_LIMIT, SCHEDULED
from services.delayed import rate_limits
from services.delayed.rate_limits import Delay, Rate
from tests.integration.delivery.test_scheduled import start, wait_scheduled
from tests.support.checkout import odd_checkout
from tests.support.harness import Harness, Stack
from tests.support.redis.broker import Broker
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS

MOSTLY_ONE = ("prefork", *(pytest.param(pool, marks=pytest.mark.slow) for pool in ("threads", "solo")))
HOUR = 3600
# How exactly Redis keeps a time: a microsecond, and what adding up costs.
EXACT = 1e-3
SELDOM = f"{RATE_LIMIT}odd_tasks.seldom"


@pytest.fixture
def stack(harness: Harness, tmp_path: Path) -> Stack:
    """A Redis without workers."""
    harness.checkout = odd_checkout(tmp_path / "code")
    return harness.stack(CELERY_IMPORTS="probe,odd_tasks", WORKER_LEASE="6")


def read_start(stack: Stack, label: str = "seldom-0") -> float:
    """When a task was started, which was once."""
    ((_, _, moment),) = stack.harness.notes("start", label)
    return moment


def limit_rate(stack: Stack, task: str, rate: object) -> None:
    assert stack.client.control.rate_limit(task, rate, reply=True, timeout=TIMEOUT_SECONDS, limit=1)


def send_seldom(stack: Stack, count: int, **options: Any) -> dict[str, Any]:
    """Tasks that may start once an hour, by their labels."""
    labels = [f"seldom-{number}" for number in range(count)]
    return {label: stack.send("odd_tasks.seldom", label, **options) for label in labels}


def dues(stack: Stack) -> dict[str, float]:
    """When what waits in Redis is due, by the ids of the tasks, the next one first."""
    found: Any = stack.redis.client().zrange(SCHEDULED, 0, -1, withscores=True)
    return {str(field): float(due) for field, due in found}


def check_apart(stack: Stack, seconds: float) -> None:
    for first, second in pairwise(dues(stack).values()):
        assert second - first == pytest.approx(seconds, abs=EXACT)


def in_order(stack: Stack) -> list[str]:
    return [label for label, _, _ in stack.harness.notes("start") if label.startswith("seldom")]


def no_place_is_taken(stack: Stack) -> None:
    # In the order in which a task passes through them.
    stack.harness.wait_until(lambda: stack.waiting() == stack.unacked() == 0, TIMEOUT_SECONDS, "none is unacknowledged")


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_over_their_rate_wait_in_redis_and_all_others_run(stack: Stack, pool: str) -> None:
    sent = {}
    for number in range(10):
        label = f"seldom-{number}"
        sent[label] = stack.send("odd_tasks.seldom", label)
        for other in range(10):
            stack.send("probe.mark", f"other-{number}-{other}")
    worker = stack.worker(WORKER_POOL=pool)

    for number in range(10):
        for other in range(10):
            stack.harness.wait_started(f"other-{number}-{other}")
    stack.harness.wait_started("seldom-0")
    wait_scheduled(stack, 9)
    no_place_is_taken(stack)

    assert in_order(stack) == ["seldom-0"]
    found = dues(stack)
    assert list(found) == [one.id for one in list(sent.values())[1:]]
    assert found[sent["seldom-1"].id] <= read_start(stack) + HOUR
    check_apart(stack, HOUR)
    # One is revoked; for the others the limit is lifted.
    worker.ready()
    stack.client.control.revoke(sent["seldom-1"].id)
    wait_scheduled(stack, 8)
    limit_rate(stack, "odd_tasks.seldom", "1/m")
    stack.harness.wait_started("seldom-2")
    wait_scheduled(stack, 7)
    check_apart(stack, 60)
    limit_rate(stack, "odd_tasks.seldom", 0)
    stack.harness.wait_started("seldom-9")
    assert in_order(stack) == [f"seldom-{number}" for number in range(10) if number != 1]


def test_inspect_shows_what_waits_for_its_rate_with_its_time(stack: Stack) -> None:
    node = start(stack).ready()
    sent = send_seldom(stack, 2, countdown=0.5)
    wait_scheduled(stack, 1)
    # Until its time, the first one waits in the node's timer, and is told of as well.
    stack.harness.wait_started("seldom-0")

    def list_scheduled() -> Any:
        answers = stack.client.control.broadcast("scheduled", reply=True, timeout=2, limit=1)
        return [one for answer in answers for listed in answer.values() for one in listed]

    [one] = stack.harness.wait_until(list_scheduled, TIMEOUT_SECONDS, "the node tells of it")
    assert (one["request"]["id"], one["request"]["name"]) == (sent["seldom-1"].id, "odd_tasks.seldom")
    # Not that of its own, which has passed, but that of its token.
    eta = datetime.fromisoformat(one["eta"]).astimezone(UTC).timestamp()
    assert eta == pytest.approx(dues(stack)[sent["seldom-1"].id], abs=EXACT)
    assert node.process.alive


def test_a_rate_of_all_nodes_together_is_that_of_one(stack: Stack) -> None:
    settings = {"WORKER_RATE_LIMIT_SCOPE": "shared", "WORKER_POOL": "solo", "WORKER_PROCESSES": "2"}
    stack.worker(**settings).ready(2)

    send_seldom(stack, 6)

    wait_scheduled(stack, 5)
    no_place_is_taken(stack)
    # Both nodes have taken one when the first of them starts.
    assert len(in_order(stack)) == 1
    check_apart(stack, HOUR)


def test_each_node_has_a_rate_of_its_own(stack: Stack) -> None:
    stack.worker(WORKER_POOL="solo", WORKER_PROCESSES="2").ready(2)

    def both() -> bool:
        """Whoever is quicker takes a task."""
        stack.send("odd_tasks.seldom", f"seldom-{len(in_order(stack))}")
        return len(in_order(stack)) == 2

    stack.harness.wait_until(both, TIMEOUT_SECONDS, "each node starts one")
    send_seldom(stack, 20)
    no_place_is_taken(stack)
    assert len(in_order(stack)) == 2
    assert len(stack.redis.client().hgetall(SELDOM)) == 2


@pytest.mark.parametrize("faster", [False, True], ids=["with the same rate", "with another rate"])
def test_what_waits_for_a_node_that_was_killed_has_the_rate_of_its_successor(stack: Stack, faster: bool) -> None:
    first = start(stack).ready()
    send_seldom(stack, 6)
    wait_scheduled(stack, 5)
    first.process.signal(signal.SIGKILL)
    first.exits(TIMEOUT_SECONDS)

    if faster:
        stack.harness.checkout.write("faster.py", "import odd_tasks\n\nodd_tasks.seldom.rate_limit = '1/m'\n")
        start(stack, CELERY_IMPORTS="probe,odd_tasks,faster").ready()
    else:
        start(stack, name="node1").ready()

    apart = 60 if faster else HOUR
    stack.harness.wait_started("seldom-1")
    wait_scheduled(stack, 4)
    no_place_is_taken(stack)
    check_apart(stack, apart)
    # With one that comes now it is the same.
    stack.send("odd_tasks.seldom", "seldom-6")
    wait_scheduled(stack, 5)
    check_apart(stack, apart)
    assert in_order(stack) == ["seldom-0", "seldom-1"]


def test_a_node_that_stops_leaves_what_waits_to_others_and_starts_no_more_when_it_is_back(stack: Stack) -> None:
    node = start(stack).ready()
    sent = send_seldom(stack, 4)
    wait_scheduled(stack, 3)

    node.process.terminate()
    assert node.exits(TIMEOUT_SECONDS) == 0

    raws: Any = stack.redis.client().lrange("celery", 0, -1)
    assert [json.loads(raw)["headers"]["id"] for raw in reversed(raws)] == [one.id for one in list(sent.values())[1:]]
    assert "rate_limit_token" not in "".join(raws)
    start(stack).ready()
    wait_scheduled(stack, 3)
    no_place_is_taken(stack)
    assert in_order(stack) == ["seldom-0"]


def test_the_tokens_of_what_is_purged_or_expires_are_free_again(stack: Stack) -> None:
    stack.worker(WORKER_POOL="threads", WORKER_QUEUES="celery,other").ready()
    send_seldom(stack, 5)
    wait_scheduled(stack, 4)
    kept = stack.send("odd_tasks.seldom", "seldom-kept", queue="other")
    wait_scheduled(stack, 5)

    assert stack.celery("purge -f -Q celery").exits(TIMEOUT_SECONDS) == 0

    stack.harness.wait_until(lambda: list(dues(stack)) == [kept.id], TIMEOUT_SECONDS, "the other queue's waits alone")
    assert dues(stack)[kept.id] <= read_start(stack) + HOUR

    expires = stack.send("odd_tasks.seldom", "seldom-expires", expires=3)
    after = stack.send("odd_tasks.seldom", "seldom-after")
    stack.harness.wait_until(lambda: expires.state == "REVOKED", TIMEOUT_SECONDS, "it has expired")
    wait_scheduled(stack, 2)
    # It was discarded only then, and has taken none.
    assert dues(stack)[after.id] <= read_start(stack) + 2 * HOUR
    assert in_order(stack) == ["seldom-0"]


@pytest.mark.parametrize("pool", MOSTLY_ONE)
def test_an_eta_and_a_rate_are_both_kept(stack: Stack, pool: str) -> None:
    moment = time()
    sent = [stack.send("odd_tasks.seldom", f"seldom-{number}", countdown=2) for number in range(2)]
    stack.worker(WORKER_POOL=pool)

    stack.harness.wait_until(lambda: in_order(stack), TIMEOUT_SECONDS, "one of them starts")
    [label] = in_order(stack)
    assert read_start(stack, label) > moment + 2 - EXACT
    wait_scheduled(stack, 1)
    [waits] = dues(stack)
    assert {waits, sent[int(label[-1])].id} == {one.id for one in sent}
    no_place_is_taken(stack)


@pytest.mark.parametrize("pool", MOSTLY_ONE)
def test_tasks_with_a_rate_are_neither_lost_nor_doubled_when_connections_break(stack: Stack, pool: str) -> None:
    stack.worker(WORKER_POOL=pool).ready()
    client: Any = stack.redis.client()
    labels = [f"often-{number}" for number in range(100)]
    for number, label in enumerate(labels):
        stack.send("odd_tasks.often", label)
        if number % 20 == 10:
            client.client_kill_filter(_type="normal", skipme=True)

    for label in labels:
        stack.harness.wait_started(label)
    no_place_is_taken(stack)
    assert sorted(label for label, _, _ in stack.harness.notes("start")) == sorted(labels)


def test_a_token_that_redis_refuses_keeps_neither_the_node_nor_others_and_the_task_starts_later(stack: Stack) -> None:
    client: Any = stack.redis.client()
    node = stack.worker(WORKER_POOL="threads").ready()
    client.set(SELDOM, "somebody else's")

    stack.send("odd_tasks.seldom", "seldom-0")
    stack.send("probe.mark", "other")

    stack.harness.wait_started("other")
    node.says(r"rate limits: waiting for Redis at \S+ to give tokens to odd_tasks\.seldom: WRONGTYPE")
    wait_scheduled(stack, 1)
    client.delete(SELDOM)
    stack.harness.wait_started("seldom-0")
    node.says("rate limits: goes on")
    assert not node.process.count("consumer: waiting for"), "it has connected again"


def test_a_batch_has_no_rate_as_with_celery(stack: Stack) -> None:
    stack.worker(WORKER_POOL="threads", WORKER_PREFETCH_MULTIPLIER="4").ready()
    # It says so a moment before it listens, and to nothing else: it has no gossip.
    stack.harness.wait_until(stack.redis.client().pubsub_numpat, TIMEOUT_SECONDS, "the node hears commands")
    limit_rate(stack, "odd_tasks.in_batches", "1/h")
    labels = [f"batch-{number}" for number in range(4)]
    for label in labels:
        stack.send("odd_tasks.in_batches", label, "ends")
    for label in labels:
        stack.harness.wait_started(label)


# --- Tokens


@pytest.fixture
def client(broker: Broker) -> Any:
    return Client(port=broker.server.port)


NODE = Rate.per_second("a task", 1 / HOUR, "node")
NODE_TOKEN = ("a task", NODE.interval, "node")


def take(client: Any, rate: Rate = NODE, token: Any = None, *, earliest: float = 0, expires: float = 0) -> Delay | None:
    return rate.take_token(client, {"rate_limit_token": token}, 1, earliest, expires)


def waits(delay: Delay | None, seconds: float) -> bool:
    """Whether it waits for so long, or as much less as a slow machine has needed since."""
    return delay is not None and seconds - TIMEOUT_SECONDS < delay.due - time() <= seconds


@pytest.mark.each_redis
def test_a_token_that_was_waited_for_is_good_once_from_its_time_on(client: Any) -> None:
    late = [*NODE_TOKEN, time() - 2 * HOUR, 1]
    assert take(client, token=late) is None
    # Whoever comes later than others that have started meanwhile takes another token.
    assert waits(take(client, token=late), HOUR)
    assert waits(take(client, token=late), 2 * HOUR)
    client.delete(f"{RATE_LIMIT}a task")
    assert take(client) is None
    # It comes back at its time.
    assert take(client, token=[*NODE_TOKEN, time(), 1]) is None
    # It has been started, and comes again; its rate was another one; it was a token of all nodes.
    others: list[Any] = [
        [*NODE_TOKEN, time(), 2],
        ["a task", "60.000000000", "node", time(), 1],
        ["a task", NODE.interval, "", time(), 1],
        ["another task", NODE.interval, "node", time(), 1],
        [*NODE_TOKEN, "now", 1],
        "a token",
        {},
    ]
    for other in others:
        client.delete(f"{RATE_LIMIT}a task")
        assert take(client) is None
        assert waits(take(client, token=other), HOUR), other


@pytest.mark.each_redis
def test_tokens_come_one_interval_apart_whatever_is_asked_for(client: Any) -> None:
    soon = time() + 1
    assert take(client, earliest=soon) is None, "it waits for its ETA in the node"
    assert waits(take(client), HOUR + 1)
    expires = take(client, expires=time() + HOUR)
    assert waits(expires, HOUR + 1) and expires and not expires.token
    assert waits(take(client), 2 * HOUR + 1)
    # Others have theirs.
    assert take(client, Rate.per_second("a task", 1 / HOUR, "other")) is None
    assert take(client, Rate.per_second("a task", 1 / HOUR, "")) is None
    assert take(client, Rate.per_second("another task", 1 / HOUR, "node")) is None


@pytest.mark.each_redis
def test_nodes_with_different_rates_take_turns_until_one_settles_it(client: Any) -> None:
    faster = Rate.per_second("a task", 1 / 60, "node")
    assert take(client) is None
    for rate, seconds in ((faster, HOUR), (NODE, HOUR + 60), (faster, 2 * HOUR + 60)):
        assert waits(take(client, rate), seconds)
    rate_limits.requeue_outdated(client, {"a task": faster})
    # The new rate begins anew.
    assert take(client, faster) is None
    assert waits(take(client, faster), 60)


@pytest.mark.each_redis
def test_a_rate_is_forgotten_with_its_last_token_however_fast_it_is(client: Any) -> None:
    key = f"{RATE_LIMIT}a task"
    for rate in (Rate.per_second("a task", 10_000, "fast"), NODE, NODE):
        take(client, rate)
    assert HOUR < client.ttl(key) <= 2 * HOUR
    take(client, Rate.per_second("a task", 1, "third"))
    assert sorted(client.hgetall(key)) == [b"node", b"third"]
    assert HOUR < client.ttl(key) <= 2 * HOUR
    rate = Rate.per_second("a task", 1e6, "node")
    assert json.loads(rate._format_token(1.0, 3)) == ["a task", rate.interval, "node", 1.0, 3]
    assert rate.interval == "0.000001000"
    assert scripts.TOKEN(client, [b"k"], [rate.node, rate.interval, 0, 0, 0]) == [b"", 1]
