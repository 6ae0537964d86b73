"""No message is acknowledged before its result is stored: every way to end, every pool, a Redis that takes nothing.

Results have a Redis of their own here, so that the broker goes on while they cannot be stored.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, current_app, group
from celery.app.task import Context
from celery.backends import redis as stock
from celery.exceptions import TaskRevokedError

from config import load
from services.application import Stalk
from services.broker.retry import RetryState
from services.results import backend, chord_deduplication
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.redis.server import RedisServer
from tests.support.world import Node, Stack, World, forget_results

PATIENCE = 120
POOLS = ("prefork", "threads", "solo")
WAYS = {"returns": "SUCCESS", "raises": "FAILURE", "retries": "RETRY"}
# Stock Celery has lost a result, or run its task twice, within a second; the first connection of a process it tries
# for four.
OUTAGE_SECONDS = 6
SOFT_SHUTDOWN = 2
# The shipped lower bound is 45 s. A busy machine may keep a node from its loop for some seconds.
HEARTBEAT_TIMEOUT = 10
# A heartbeat comes each 2 s, and the watchdog looks each 5 s.
KILLED_SECONDS = HEARTBEAT_TIMEOUT + 7
WAITS = "retry: waiting for"


class Results:
    """The Redis that keeps the results, and what befalls it."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis

    def fail(self, fault: str) -> None:
        """Make it take nothing any more."""
        if fault == "killed":
            self.redis.kill()
            assert not self.redis.process.alive
        elif fault == "frozen":
            self.redis.freeze()
        else:
            self.redis.ask("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(stock.redis.exceptions.OutOfMemoryError):
                self.redis.client(1).set("more", "than there is room for")

    def recover(self, fault: str) -> None:
        if fault == "killed":
            self.redis.start()
        elif fault == "frozen":
            self.redis.thaw()
        else:
            self.redis.ask("CONFIG", "SET", "maxmemory", "0")

    def of(self, sent: Any) -> dict[str, Any]:
        """What is stored of a task."""
        text = self.redis.client(1).get(f"celery-task-meta-{sent.id}")
        return dict(json.loads(str(text))) if text else {"status": None, "result": None}

    def state(self, sent: Any) -> Any:
        return self.of(sent)["status"]


@pytest.fixture(scope="module")
def bench(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Results]:
    """A broker and a Redis for results, and code that is quicker to give up and to look again than it is shipped."""
    checkout = Checkout(tmp_path_factory.mktemp("results") / "code")
    checkout.fork_server = LIBRARIES_ONLY
    checkout.replace("config/celery.py", "\nSOCKET_TIMEOUT_SECONDS = 10", "\nSOCKET_TIMEOUT_SECONDS = 2")
    checkout.replace("config/settings.py", "ge=45", "ge=1")
    checkout.replace("services/broker/retry.py", "LONGEST_PAUSE_SECONDS = 5.0", "LONGEST_PAUSE_SECONDS = 1.0")
    checkout.replace("services/broker/retry.py", "BROKEN_TRIES = 10", "BROKEN_TRIES = 3")
    shared_world.checkout = checkout
    broker, kept = shared_world.redis(), shared_world.redis()
    stack = shared_world.stack(
        broker,
        CELERY_RESULT_BACKEND=kept.url(1, password=""),
        WORKER_SOFT_SHUTDOWN=str(SOFT_SHUTDOWN),
        WORKER_STOP_GRACE_PERIOD=str(SOFT_SHUTDOWN + 15),
    )
    return stack, Results(kept)


@pytest.fixture(scope="module")
def nodes(bench: tuple[Stack, Results]) -> dict[str, Node]:
    """A worker of each pool, with room for three tasks at a time, on the queue of its pool's name."""
    stack, _ = bench
    room: dict[str, dict[str, str]] = {"solo": {"WORKER_PROCESSES": "3"}}
    found = {
        pool: stack.worker(
            WORKER_POOL=pool, WORKER_QUEUES=pool, **room.get(pool, {"WORKER_CONCURRENCY": str(len(WAYS))})
        )
        for pool in POOLS
    }
    for pool, node in found.items():
        node.ready(3 if pool == "solo" else 1)
    return found


def running(stack: Stack, labels: Iterable[str]) -> None:
    """Wait until the tasks with these labels run."""
    for label in labels:
        stack.world.wait_started(label)


def release(stack: Stack, labels: Iterable[str]) -> None:
    """Let these tasks end, and wait until they have."""
    for label in labels:
        stack.world.release(label)
    for label in labels:
        stack.world.wait_until(lambda label=label: stack.world.ended(label), PATIENCE, f"{label} has ended")  # type: ignore[misc]


def all_have(
    stack: Stack, what: Callable[[Any], object], sent: Mapping[str, Any], wanted: Mapping[str, object]
) -> None:
    """Wait until `what` of each task is as wanted."""
    stack.world.wait_until(
        lambda: {label: what(one) for label, one in sent.items()} == wanted, PATIENCE, f"{wanted} is stored"
    )


def record_failure(node: Node) -> bool:
    """Whether its log has as many ends of waits as beginnings."""
    return node.process.count(WAITS) == node.process.count("retry: goes on after")


@pytest.mark.parametrize("fault", ["killed", "frozen", "full"])
def test_a_result_that_redis_does_not_take_is_stored_later_and_its_task_runs_once(
    bench: tuple[Stack, Results], nodes: dict[str, Node], fault: str
) -> None:
    stack, kept = bench
    ways = {f"{fault}-{pool}-{way}": (pool, way) for pool in POOLS for way in WAYS}
    sent = {label: stack.send("probe.end", label, way, queue=pool) for label, (pool, way) in ways.items()}
    running(stack, sent)

    kept.fail(fault)
    release(stack, sent)
    stack.world.holds_for(lambda: stack.unacked() == len(sent), OUTAGE_SECONDS, "no task is acknowledged")
    kept.recover(fault)

    all_have(stack, kept.state, sent, {label: WAYS[way] for label, (_, way) in ways.items()})
    # The second try may begin before RETRY of the first is stored, which would take the place of its result.
    again = {f"{fault}-{pool}-retries-again": sent[f"{fault}-{pool}-retries"] for pool in POOLS}
    release(stack, again)
    all_have(stack, kept.state, again, dict.fromkeys(again, "SUCCESS"))
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert [stack.world.started(label) for label in (*sent, *again)] == [1] * len((*sent, *again))
    for node in nodes.values():
        # A line when it begins, one when it is over, and no traceback of it; they pass through Supervisor's pipe.
        stack.world.wait_until(partial(record_failure, node), PATIENCE, "each wait is over in the log too")
        assert node.process.count(r"redis\.exceptions") == 0


def test_a_chord_whose_parts_end_while_redis_is_away_runs_its_body_once(
    bench: tuple[Stack, Results], nodes: dict[str, Node]
) -> None:
    stack, kept = bench
    labels = {f"part-{pool}": pool for pool in POOLS}
    parts = [signature(stack, "end", label, "returns", queue=pool) for label, pool in labels.items()]
    sent = chord(parts, app=stack.client)(signature(stack, "collect", "body", queue="threads"))
    running(stack, labels)

    kept.fail("killed")
    release(stack, labels)
    stack.world.holds_for(lambda: stack.unacked() == len(parts), OUTAGE_SECONDS, "no part is acknowledged")
    kept.recover("killed")

    all_have(stack, lambda one: kept.of(one)["result"], {"body": sent}, {"body": list(labels)})
    assert stack.world.started("body") == 1


def test_a_chord_is_finished_by_the_next_part_when_who_was_about_to_has_died(
    bench: tuple[Stack, Results], nodes: dict[str, Node]
) -> None:
    stack, kept = bench
    part = signature(stack, "end", "heir", "returns", queue="threads")
    sent = chord([part], app=stack.client)(signature(stack, "collect", "inherited", queue="threads"))
    group = sent.parent.id
    stack.world.wait_started("heir")

    # As a worker leaves it that has died between the last part and the sending of the body.
    assert kept.redis.client(1).set(f"celery-taskset-meta-{group}.c", "dead", ex=600)
    release(stack, ["heir"])

    all_have(stack, lambda one: kept.of(one)["result"], {"body": sent}, {"body": ["heir"]})
    assert stack.world.started("inherited") == 1


def test_a_part_whose_process_dies_before_its_chord_has_counted_it_runs_again(
    bench: tuple[Stack, Results], nodes: dict[str, Node]
) -> None:
    stack, kept = bench
    parts = [signature(stack, "fall", label, queue="prefork") for label in ("fallen", "falling")]
    sent = chord(parts, app=stack.client)(signature(stack, "collect", "caught", queue="threads"))

    all_have(stack, lambda one: kept.of(one)["result"], {"body": sent}, {"body": ["fallen", "falling"]})
    assert [stack.world.started(label) for label in ("fallen", "falling", "caught")] == [2, 2, 1]


class Died(BaseException):
    """A worker ends here."""


def die(**_: Any) -> None:
    raise Died


@pytest.fixture
def sender(bench: tuple[Stack, Results]) -> Iterator[Stalk]:
    """An application that does what a worker does after a task's end."""
    redis = bench[1].redis
    before = current_app._get_current_object()
    # A chain that is sent asks for the current application.
    with Stalk("sender", broker=redis.url(2), backend=redis.url(1)) as app:
        app.loader.override_backends = backend.BACKENDS
        yield app
        forget_results(app)
    before.set_current()


@dataclass
class Dispatch:
    """A chord whose last part has ended, in the hands of an application."""

    sender: Stalk
    redis: RedisServer

    def send(self, chord: Any) -> Context:
        """Send a chord of one part to the queue `part`; its request, in the worker that has run it."""
        chord.apply_async()
        message = json.loads(str(self.redis.client(2).rpop("part")))
        return Context(message["headers"], chord=json.loads(base64.b64decode(message["body"]))[2]["chord"])

    def end(self, part: Context) -> int:
        """Tell the chord that it has ended; how many messages are in the queue `body` then."""
        self.sender.backend.on_chord_part_return(part, "SUCCESS", 1)
        return self.waiting()

    def waiting(self) -> int:
        return int(self.redis.client(2).llen("body"))


@pytest.fixture
def dispatch(bench: tuple[Stack, Results], sender: Stalk) -> Dispatch:
    bench[1].redis.client(2).flushdb()
    return Dispatch(sender, bench[1].redis)


def chords(one: Any) -> Any:
    """A body of two chords, which are made when it is dispatched."""
    return group(chord([one, one], one), chord([one, one], one))


BODIES: dict[str, Callable[[Any], Any]] = {
    "a task": lambda one: one,
    "a group": lambda one: group(one, one),
    "a chain": lambda one: chain(one, one),
    "a chord": lambda one: chord([one, one], one),
    "a group of chords": chords,
}


@pytest.mark.parametrize(
    ("form", "first", "both"),
    # A chord that is made anew is another one, which has to come to its end.
    [("a task", 1, 1), ("a group", 2, 2), ("a chain", 1, 1), ("a chord", 2, 2), ("a group of chords", 4, 8)],
)
def test_the_body_of_a_chord_is_enqueued_once_when_who_has_sent_it_dies_before_saying_so(
    dispatch: Dispatch, form: str, first: int, both: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = dispatch.sender
    body = BODIES[form](sender.signature("body", queue="body"))
    part = dispatch.send(chord([sender.signature("part", queue="part")], body, app=sender))
    with monkeypatch.context() as patch:
        patch.setattr(sender.backend, "_chord_cleanup_script", die)
        with pytest.raises(Died):
            dispatch.end(part)
    assert dispatch.waiting() == first

    assert dispatch.end(part) == both

    # It is done with now, whoever comes.
    assert dispatch.end(part) == both
    assert dispatch.redis.client(1).keys(f"*{part.group}*") == [f"celery-taskset-meta-{part.group}.c"]


def test_a_chord_that_is_sent_a_second_time_has_its_body_a_second_time(dispatch: Dispatch) -> None:
    sender = dispatch.sender
    signature = chord([sender.signature("part", queue="part")], sender.signature("body", queue="body"), app=sender)
    # From now on it has the same ids each time.
    signature.freeze()

    assert [dispatch.end(dispatch.send(signature)) for _ in range(2)] == [1, 2]


def test_a_chord_is_counted_while_somebody_flushes_the_scripts(dispatch: Dispatch) -> None:
    counted = dispatch.sender.backend.client.register_script("return KEYS[1]")
    enough = threading.Event()

    def flush() -> None:
        client = dispatch.redis.client()
        while not enough.is_set():
            client.script_flush()

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        # redis-py's own way, to load a script and ask again, does not survive this.
        assert [int(counted(keys=[number])) for number in range(5000)] == list(range(5000))
    finally:
        enough.set()
        flushing.join()


@pytest.mark.parametrize(
    ("script", "claimed"), [(stock.CHORD_PART_RETURN_LUA, 0), (chord_deduplication.CHORD_PART_SCRIPT, 1)]
)
def test_a_part_that_comes_back_has_its_chord(bench: tuple[Stack, Results], script: str, claimed: int) -> None:
    """By our script; with Celery's own the chord may be nobody's. Once that is mended there, ours can go."""
    client, group = bench[1].redis.client(1), f"celery-taskset-meta-{uuid4()}"
    part = client.register_script(script)
    keys = [group + suffix for suffix in (".j", ".t", ".s", ".d", "", ".c", ".run")]
    client.set(group + ".s", 2)

    answers = [part(keys=keys, args=[task, task, 1, 0, 60, 60, 10, uuid4().hex]) for task in ("one", "two", "one")]

    assert [answer[3] for answer in answers] == [0, 1, claimed]


def signature(stack: Stack, task: str, *arguments: object, **options: str) -> Any:
    return stack.client.signature(f"probe.{task}", args=arguments, options=options)


@pytest.mark.parametrize("kind", ["object", "megabytes"])
def test_a_result_that_can_never_be_stored_is_a_failure_with_the_reason(
    bench: tuple[Stack, Results], nodes: dict[str, Node], kind: str
) -> None:
    stack, kept = bench
    kept.redis.ask("CONFIG", "SET", "proto-max-bulk-len", "1mb")
    sent = {pool: stack.send("probe.deliver", f"{kind}-{pool}", kind, queue=pool) for pool in POOLS}

    all_have(stack, kept.state, sent, dict.fromkeys(POOLS, "FAILURE"))

    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert {kept.of(one)["result"]["exc_type"] for one in sent.values()} <= {"EncodeError", "ConnectionError"}
    assert [stack.world.started(f"{kind}-{pool}") for pool in POOLS] == [1, 1, 1]


def test_a_task_of_which_not_even_the_failure_can_be_stored_does_not_run_for_ever(
    bench: tuple[Stack, Results], nodes: dict[str, Node]
) -> None:
    stack, kept = bench
    for pool in POOLS:
        # Nothing is ever stored under a key that holds something else.
        kept.redis.client(1).rpush(f"celery-task-meta-spoilt-{pool}", "a list")
        stack.send("probe.mark", f"spoilt-{pool}", queue=pool, task_id=f"spoilt-{pool}")

    for pool in POOLS:
        nodes[pool].says(rf"results: FAILURE of spoilt-{pool} can never be stored", PATIENCE)

    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert [stack.world.started(f"spoilt-{pool}") for pool in POOLS] == [1, 1, 1]


def test_a_stop_gives_back_the_tasks_whose_results_wait(bench: tuple[Stack, Results]) -> None:
    stack, kept = bench
    workers = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=f"stop-{pool}") for pool in POOLS}
    for worker in workers.values():
        worker.ready()
    sent = {f"stop-{pool}": stack.send("probe.end", f"stop-{pool}", "returns", queue=f"stop-{pool}") for pool in POOLS}
    running(stack, sent)
    # What the tests before have left is acknowledged by now.
    stack.world.wait_until(lambda: stack.unacked() == len(sent), PATIENCE, "nobody holds anything else")
    kept.fail("killed")
    release(stack, sent)
    for worker in workers.values():
        worker.says(WAITS)

    for worker in workers.values():
        worker.process.terminate()

    # One that waited for the Redis of the results would never leave.
    assert [worker.exits(PATIENCE) for worker in workers.values()] == [0, 0, 0]
    assert [stack.waiting(label) for label in sent] == [1, 1, 1]
    assert stack.unacked() == 0
    kept.recover("killed")
    stack.worker(WORKER_POOL="threads", WORKER_QUEUES=",".join(sent)).ready()
    all_have(stack, kept.state, sent, dict.fromkeys(sent, "SUCCESS"))
    assert [stack.world.started(label) for label in sent] == [2, 2, 2]


@pytest.mark.slow
def test_what_the_main_process_of_a_prefork_node_stores_is_waited_for_too(bench: tuple[Stack, Results]) -> None:
    """A time limit, a child that is gone, a revoked task, and a stop in the middle of it."""
    stack, kept = bench
    wanted = {"limited": "FAILURE", "lost": "FAILURE", "revoked": "REVOKED", "patient": "SUCCESS", "stopped": None}
    workers = {
        label: stack.worker(WORKER_QUEUES=label, WORKER_HEARTBEAT_TIMEOUT=str(HEARTBEAT_TIMEOUT)) for label in wanted
    }
    for worker in workers.values():
        worker.ready()
    # The time of the one with the limit begins when Redis is away: until then, this one is in its place.
    stack.send("probe.hold", "before", queue="limited", ignore_result=True)
    sent = {
        "limited": stack.send("probe.overrun", "limited", queue="limited"),
        "lost": stack.send("probe.vanish", "lost", queue="lost"),
        "revoked": stack.send("probe.hold", "revoked", queue="revoked"),
        "patient": stack.send("probe.end", "patient", "returns", queue="patient"),
        "stopped": stack.send("probe.vanish", "stopped", queue="stopped"),
    }
    running(stack, ["before", "lost", "revoked", "patient", "stopped"])
    kept.fail("killed")
    stack.client.control.revoke(sent["revoked"].id, terminate=True)
    release(stack, ["before", "lost", "patient", "stopped"])
    for worker in workers.values():
        worker.says(WAITS)
    # It has ended before its soft time limit, and is stored after it. This is how its child is told.
    ((_, child, _),) = stack.world.notes("start", "patient")
    os.kill(child, signal.SIGUSR1)
    workers["stopped"].process.terminate()

    assert workers["stopped"].exits(PATIENCE) == 0
    assert stack.waiting("stopped") == 1
    del sent["stopped"], wanted["stopped"], workers["stopped"]
    stack.world.holds_for(lambda: stack.unacked() == len(sent), KILLED_SECONDS, "nothing is acknowledged")
    # Their main loops stand still, and for a good reason.
    words = [worker.heartbeat() for worker in workers.values()]
    stack.world.wait_until(lambda: {path.read_text() for path in words} == {"ready\n"}, PATIENCE, "all are alive")
    assert [worker.process.count("watchdog: killing") for worker in workers.values()] == [0] * len(workers)
    kept.recover("killed")
    all_have(stack, kept.state, sent, wanted)
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "all are acknowledged")
    assert {label: stack.world.started(label) for label in sent} == dict.fromkeys(sent, 1)
    errors = {label: kept.of(one)["result"] for label, one in sent.items() if label in ("limited", "lost")}
    assert {label: error["exc_type"] for label, error in errors.items()} == {
        "limited": "TimeLimitExceeded",
        "lost": "WorkerLostError",
    }


ENDS = {"SUCCESS": "done", "FAILURE": ValueError("in vain"), "REVOKED": TaskRevokedError("not any more")}


@pytest.mark.parametrize("state", ENDS)
def test_that_a_task_is_tried_again_is_not_stored_over_the_end_of_a_later_try(
    bench: tuple[Stack, Results], state: str
) -> None:
    """The retry is sent first; who is quick with it has ended it by then."""
    stack, _ = bench
    backend, task_id = create_app(load(stack.environment())).backend, uuid4().hex

    def store(state: str, retries: int) -> str:
        request = Context(id=task_id, retries=retries)
        backend.store_result(task_id, ENDS.get(state, ValueError("once more")), state, request=request)
        return str(backend.get_state(task_id))

    assert store("RETRY", 0) == "RETRY"
    assert store(state, 1) == state
    assert store("RETRY", 0) == state
    # A dead letter that is replayed goes on with the retries that it had.
    assert store("RETRY", 1) == ("SUCCESS" if state == "SUCCESS" else "RETRY")


def test_that_a_task_is_tried_again_is_stored_where_nobody_may_run_scripts(
    bench: tuple[Stack, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker waits for rights that it lacks; here it does not need them."""
    monkeypatch.setattr(RetryState, "in_worker", True)
    stack, kept = bench
    kept.redis.client().acl_setuser(
        "scriptless", enabled=True, nopass=True, keys="*", channels="*", categories=["+@all", "-@scripting"]
    )
    url = kept.redis.url(1, "x", "scriptless")
    backend, task_id = create_app(load(stack.environment(CELERY_RESULT_BACKEND=url))).backend, uuid4().hex

    backend.store_result(task_id, ValueError("once more"), "RETRY", request=Context(id=task_id, retries=0))

    assert backend.get_state(task_id) == "RETRY"
