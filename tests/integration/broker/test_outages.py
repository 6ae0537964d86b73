"""A Redis that is full is emptied by its workers; and what all say of one that is full, or away."""

from typing import Any
from urllib.request import urlopen

import pytest
from celery import chain, chord
from kombu.exceptions import OperationalError

from tests.integration.results.outages import GOES_ON, OUTAGE_SECONDS, WAITS, sign
from tests.support.harness import Harness, Node, Stack
from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, start_workers, wait_running

# Tasks of so many bytes, which are nearly all of what Redis holds then: 16 MB.
PADDED, PADDING = 400, 40_000
# Of maxmemory: workers go on, while a fiftieth of the tasks would have to go before a producer is heard; nobody does.
FULL, USED_UP = 1.06, 1.5
REFUSED = "command not allowed when used memory"
# No transaction: a Redis that is full refuses everything in it.
COUNT = """
local found = redis.call('HLEN', KEYS[1])
for number = 2, #KEYS do
    found = found + redis.call('LLEN', KEYS[number])
end
return found
"""


@pytest.fixture
def stack(harness: Harness) -> Stack:
    return harness.stack()


def fill(stack: Stack, queue: str) -> None:
    """Send tasks, until Redis refuses one."""
    sent = 0
    with pytest.raises(OperationalError, match=REFUSED):
        while True:
            # Once: where Redis is full at one try and not at the next, kombu publishes to a channel that it has closed.
            padding = {"padding": "x" * PADDING}
            stack.send("probe.mark", f"{queue}-{sent}", queue=queue, headers=padding, retry=False)
            sent += 1
    assert sent > PADDED / 2


def send_all_kinds(stack: Stack, queue: str) -> dict[str, Any]:
    """Send tasks that send something: retry, callback, next link, chord and other task; two of their results."""

    def sign_in(task: str, label: str, *arguments: str) -> Any:
        stack.harness.release(f"{queue}-{label}")
        return sign(stack, task, f"{queue}-{label}", *arguments, queue=queue)

    stack.harness.release(f"{queue}-retried-again")
    parts = [sign_in("end", f"part-{number}", "returns") for number in range(2)]
    chain(sign_in("end", "first", "returns"), sign_in("collect", "last"), app=stack.client)()
    sign_in("end", "called", "returns").apply_async(link=sign_in("collect", "callback"))
    sign_in("pass_on", "passing", queue).apply_async()
    sign_in("pass_on_chord", "chording", queue).apply_async()
    return {
        "retried": sign_in("end", "retried", "retries").apply_async(),
        "body": chord(parts, app=stack.client)(sign_in("collect", "body")),
    }


ONCE = """
retried retried-again first last part-0 part-1 body called callback passing passing-passed-on chording-0 chording-1
"""
# How often each label is started; the body of the chord that a task sends is called like that task.
STARTED = dict.fromkeys(ONCE.split(), 1) | {"chording": 2}


def is_empty(stack: Stack, *queues: str) -> bool:
    """Whether no task is in its queue or held: looked at in one step, because what is held sends what is queued."""
    return not stack.redis.client().eval(COUNT, len(queues) + 1, "unacked", *queues)


def is_quiet(node: Node) -> bool:
    """Whether it has said nothing loud of memory; a solo node that answers a newcomer too late has another error."""
    return not any(node.process.count(what) for what in ("OutOfMemoryError", "Frequent restarts", " CRITICAL "))


@pytest.mark.each_redis("prefork")
@pytest.mark.parametrize("pool", POOLS)
def test_a_redis_that_is_full_of_tasks_is_emptied_by_its_workers(stack: Stack, pool: str) -> None:
    harness = stack.harness
    before = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool).ready()
    held = stack.send("probe.hold", "held", queue=pool)
    harness.wait_started("held")
    sent = send_all_kinds(stack, pool)
    used = int(stack.redis.client().info("memory")["used_memory"])
    stack.redis.ask("CONFIG", "SET", "maxmemory", str(used + PADDED * PADDING))
    fill(stack, pool)
    stack.redis.fill(FULL)

    # What is first in the queue ends while Redis is full: the filling comes after it.
    late = stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool)
    late.ready()
    harness.release("held")

    harness.wait_until(lambda: is_empty(stack, pool), TIMEOUT_SECONDS, "it is empty")
    assert [one.get(timeout=TIMEOUT_SECONDS) for one in (held, sent["retried"])] == ["held", f"{pool}-retried-again"]
    assert sent["body"].get(timeout=TIMEOUT_SECONDS) == [f"{pool}-part-0", f"{pool}-part-1"]
    assert {label: harness.started(f"{pool}-{label}") for label in STARTED} == STARTED
    assert stack.send("probe.mark", "taken", queue=pool).get(timeout=TIMEOUT_SECONDS) == "taken"
    assert is_quiet(before)
    assert is_quiet(late)
    assert [node.process.count(WAITS) for node in (before, late)] == [0, 0]


@pytest.mark.each_redis
def test_a_redis_whose_headroom_is_used_up_makes_workers_wait_until_there_is_room(stack: Stack) -> None:
    harness = stack.harness
    before = start_workers(stack)
    labels = [f"{pool}-held" for pool in POOLS]
    held = [stack.send("probe.hold", label, queue=pool) for label, pool in zip(labels, POOLS, strict=True)]
    wait_running(stack, labels)
    padded = [f"{POOLS[number % len(POOLS)]}-{number}" for number in range(PADDED)]
    for label in padded:
        stack.send("probe.mark", label, queue=label.partition("-")[0], headers={"padding": "x" * PADDING})
    stack.redis.fill(USED_UP)

    late = [stack.worker(WORKER_POOL=pool, WORKER_QUEUES=pool) for pool in POOLS]
    harness.release(*labels)
    for node in (*late, *before.values()):
        node.says(WAITS)
    firsts = padded[: len(POOLS)]
    harness.holds_for(lambda: not any(map(harness.started, firsts)), OUTAGE_SECONDS, "nothing is claimed")
    stack.redis.fill(FULL)

    for node in late:
        node.ready()
    assert [one.get(timeout=TIMEOUT_SECONDS) for one in held] == labels
    harness.wait_until(lambda: is_empty(stack, *POOLS), TIMEOUT_SECONDS, "it is empty")
    assert [harness.started(label) for label in padded] == [1] * PADDED
    for node in (*late, *before.values()):
        assert is_quiet(node)
        # A line when it begins, and one when it is over.
        assert node.process.count(WAITS) == node.process.count(GOES_ON)


# What waits in each process when its Redis is away, and when it is full.
LOOPS = {
    "stopped": {
        **dict.fromkeys(POOLS, ("lease", "consumer", "retry")),
        "beat": ("beat",),
        "flower": ("events",),
    },
    "full": {**dict.fromkeys(POOLS, ("retry",)), "beat": ("beat",), "flower": ()},
}
# Of Celery's own: a line for each try, and a text about a setting that is explicit here.
FLOOD = r"Cannot connect to|Connection to broker lost|In Celery 5\.1|Traceback"


@pytest.mark.parametrize("fault", LOOPS)
def test_an_outage_has_one_line_when_it_begins_and_one_when_it_is_over(harness: Harness, fault: str) -> None:
    stack = harness.stack(BEAT_SCHEDULE="report-free-space=1")
    redis = stack.redis
    port = free_port()
    flower = f"-m services.launch flower --address 127.0.0.1 --port {port} --database {harness.path('flower.db')}"
    nodes = {"beat": stack.beat(), "flower": stack.python(flower, FLOWER_BASIC_AUTH="admin:correct-horse")}
    nodes |= start_workers(stack)
    for pool in POOLS:
        stack.send("probe.hold", f"{pool}-held", queue=pool)
    wait_running(stack, [f"{pool}-held" for pool in POOLS])
    nodes["beat"].says("beat: ticking")
    nodes["flower"].says("Flower listens")
    harness.wait_until(lambda: hears_redis(port), TIMEOUT_SECONDS, "Flower receives events")

    if fault == "stopped":
        redis.stop()
    else:
        redis.fill(USED_UP)
    harness.release(*(f"{pool}-held" for pool in POOLS))
    for name, loops in LOOPS[fault].items():
        for loop in loops:
            # A solo node, which has one thread, finds its connection broken when it can store the result.
            if (name, loop) != ("solo", "consumer"):
                nodes[name].says(rf"{loop}: waiting for Redis at \S+ to [a-z]+ .*: \S+")
    if fault == "stopped":
        redis.start()
    else:
        redis.make_room()

    for name, loops in LOOPS[fault].items():
        process = nodes[name].process
        for loop in loops:
            nodes[name].says(rf"{loop}: goes on after [\d.]+ s of waiting for Redis at \S+$")
            assert process.count(f"{loop}: waiting for") == process.count(f"{loop}: goes on") == 1, process.tail()
        assert process.count(FLOOD) == 0, process.tail()
        assert process.count(redis.password) == 0, process.tail()


def hears_redis(port: int) -> bool:
    """Whether Flower says that events can arrive."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=TIMEOUT_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
