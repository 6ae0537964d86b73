"""No message is acknowledged before its result is stored: every way to end, every pool, a Redis that takes nothing.

Results have a Redis of their own here, so that the broker goes on while they cannot be stored.
"""

import base64
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
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
from tests.integration.results.outages import (
    FAULTS,
    GOES_ON,
    OUTAGE_SECONDS,
    WAITS,
    break_redis,
    read_result,
    repair_redis,
    sign,
    wait_results,
)
from tests.support.application import create_app
from tests.support.harness import Node, Stack, forget_results
from tests.support.redis.server import RedisServer
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, release, start_workers, wait_acknowledged, wait_running

# How probe.end ends, and the state that this is.
ENDS = {"returns": "SUCCESS", "raises": "FAILURE", "retries": "RETRY"}
# The shipped lower bound is 45 s. A busy machine may keep a node from its loop for some seconds.
HEARTBEAT_TIMEOUT = 10
# A heartbeat comes each 2 s, and the watchdog looks each 5 s.
KILLED_SECONDS = HEARTBEAT_TIMEOUT + 7


@pytest.fixture(scope="module")
def workers(stack: Stack) -> dict[str, Node]:
    """A worker of each pool, with room for a task of each end."""
    return start_workers(stack, len(ENDS))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_result_that_redis_does_not_take_is_stored_later(
    stack: Stack, results: RedisServer, workers: dict[str, Node], fault: str
) -> None:
    """What returns is counted in its chord as well, whose body runs once."""
    ends = {f"{fault}-{pool}-{end}": (pool, end) for pool in POOLS for end in ENDS}
    tasks = {label: sign(stack, "end", label, end, queue=pool) for label, (pool, end) in ends.items()}
    parts, body = [f"{fault}-{pool}-returns" for pool in POOLS], f"{fault}-body"
    sent = {label: task.apply_async() for label, task in tasks.items() if label not in parts}
    merged = chord([tasks[label] for label in parts], app=stack.client)(sign(stack, "collect", body, queue="threads"))
    sent |= dict(zip(parts, merged.parent.results, strict=True))
    wait_running(stack, sent)

    break_redis(results, fault)
    release(stack, sent)
    stack.harness.holds_for(lambda: stack.unacked() == len(sent), OUTAGE_SECONDS, "no task is acknowledged")
    repair_redis(results, fault)

    wait_results(stack, results, sent, {label: ENDS[ends[label][1]] for label in sent})
    wait_results(stack, results, {body: merged}, {body: parts}, "result")
    # The second try may begin before RETRY of the first is stored, which would take the place of its result.
    again = {f"{fault}-{pool}-retries-again": sent[f"{fault}-{pool}-retries"] for pool in POOLS}
    release(stack, again)
    wait_results(stack, results, again, dict.fromkeys(again, "SUCCESS"))
    wait_acknowledged(stack)
    labels = (*sent, *again, body)
    assert [stack.harness.started(label) for label in labels] == [1] * len(labels)
    # A line when it begins, one when it is over, and no traceback of it; they pass through Supervisor's pipe.
    nodes = [worker.process for worker in workers.values()]
    ended = lambda: all(node.count(WAITS) == node.count(GOES_ON) for node in nodes)  # noqa: E731
    stack.harness.wait_until(ended, TIMEOUT_SECONDS, "each wait is over in the log too")
    assert [node.count(r"redis\.exceptions") for node in nodes] == [0, 0, 0]


def test_a_part_whose_process_dies_before_its_chord_has_counted_it_runs_again(
    stack: Stack, results: RedisServer, workers: dict[str, Node]
) -> None:
    parts = [sign(stack, "fall", label, queue="prefork") for label in ("fallen", "falling")]
    sent = chord(parts, app=stack.client)(sign(stack, "collect", "caught", queue="threads"))

    wait_results(stack, results, {"body": sent}, {"body": ["fallen", "falling"]}, "result")
    assert [stack.harness.started(label) for label in ("fallen", "falling", "caught")] == [2, 2, 1]


class Died(BaseException):
    """A worker ends here."""


def die(**_: Any) -> None:
    raise Died


class Dispatch:
    """An application that does what a worker does after the last part of a chord has ended."""

    def __init__(self, app: Stalk, redis: RedisServer) -> None:
        self.app, self.redis = app, redis
        self.redis.client(2).flushdb()

    def sign(self, queue: str) -> Any:
        """A task called like its queue."""
        return self.app.signature(queue, queue=queue)

    def send(self, chord: Any) -> Context:
        """Send a chord of one part to the queue `part`; return its request, as the worker that has run it has it."""
        chord.apply_async()
        message = json.loads(str(self.redis.client(2).rpop("part")))
        return Context(message["headers"], chord=json.loads(base64.b64decode(message["body"]))[2]["chord"])

    def end(self, part: Context) -> int:
        """End the part; return how many messages are in the queue `body` then."""
        self.app.backend.on_chord_part_return(part, "SUCCESS", 1)
        return self.count_bodies()

    def count_bodies(self) -> int:
        return int(self.redis.client(2).llen("body"))


@pytest.fixture
def dispatch(results: RedisServer) -> Iterator[Dispatch]:
    before = current_app._get_current_object()
    # A chain that is sent asks for the current application.
    with Stalk("dispatch", broker=results.url(2), backend=results.url(1)) as app:
        app.loader.override_backends = backend.BACKENDS
        yield Dispatch(app, results)
        forget_results(app)
    before.set_current()


# The form of a body, and how many messages it is when it is sent once, and when it is made anew: another chord then,
# which has to come to its end.
BODIES: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "a task": (lambda one: one, 1, 1),
    "a group": (lambda one: group(one, one), 2, 2),
    "a chain": (lambda one: chain(one, one), 1, 1),
    "a chord": (lambda one: chord([one, one], one), 2, 2),
    "a group of chords": (lambda one: group(chord([one, one], one), chord([one, one], one)), 4, 8),
}


@pytest.mark.parametrize("form", BODIES)
def test_the_body_of_a_chord_is_enqueued_once_though_its_sender_dies_before_the_chord_is_deleted(
    dispatch: Dispatch, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, first, both = BODIES[form]
    part = dispatch.send(chord([dispatch.sign("part")], make(dispatch.sign("body")), app=dispatch.app))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.app.backend, "_chord_cleanup_script", die)
        with pytest.raises(Died):
            dispatch.end(part)
    assert dispatch.count_bodies() == first

    # The second time the chord is deleted, and a part that ends once more sends nothing.
    assert [dispatch.end(part) for _ in range(2)] == [both, both]
    assert dispatch.redis.client(1).keys(f"*{part.group}*") == [f"celery-taskset-meta-{part.group}.c"]


def test_a_chord_that_is_sent_a_second_time_has_its_body_a_second_time(dispatch: Dispatch) -> None:
    twice = chord([dispatch.sign("part")], dispatch.sign("body"), app=dispatch.app)
    # From now on it has the same ids each time.
    twice.freeze()

    assert [dispatch.end(dispatch.send(twice)) for _ in range(2)] == [1, 2]


def test_a_chord_is_counted_while_scripts_are_flushed(dispatch: Dispatch) -> None:
    script = dispatch.app.backend.client.register_script("return KEYS[1]")
    enough = threading.Event()

    def flush() -> None:
        while not enough.is_set():
            dispatch.redis.client().script_flush()

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        # redis-py's own way, to load a script and ask again, does not survive this.
        assert [int(script(keys=[number])) for number in range(5000)] == list(range(5000))
    finally:
        enough.set()
        flushing.join()


@pytest.mark.parametrize(
    ("script", "claimed"), [(stock.CHORD_PART_RETURN_LUA, 0), (chord_deduplication.CHORD_PART_SCRIPT, 1)]
)
def test_a_part_that_runs_again_may_send_the_body_of_its_chord(results: RedisServer, script: str, claimed: int) -> None:
    """By our script; by Celery's own, nobody may when the worker that had the right to is dead."""
    client, group = results.client(1), f"celery-taskset-meta-{uuid4()}"
    part = client.register_script(script)
    keys = [group + suffix for suffix in (".j", ".t", ".s", ".d", "", ".c", ".run")]
    client.set(group + ".s", 2)

    answers = [part(keys=keys, args=[task, task, 1, 0, 60, 60, 10, uuid4().hex]) for task in ("one", "two", "one")]

    # The second answer would tell its worker that it has the right to; the third one has to get it too.
    assert [answer[3] for answer in answers] == [0, 1, claimed]


@pytest.mark.parametrize("kind", ["object", "megabytes"])
@pytest.mark.usefixtures("workers")
def test_a_result_that_can_never_be_stored_is_a_failure_with_the_reason(
    stack: Stack, results: RedisServer, kind: str
) -> None:
    results.ask("CONFIG", "SET", "proto-max-bulk-len", "1mb")
    sent = {pool: stack.send("probe.deliver", f"{kind}-{pool}", kind, queue=pool) for pool in POOLS}

    wait_results(stack, results, sent, dict.fromkeys(POOLS, "FAILURE"))

    wait_acknowledged(stack)
    errors = {read_result(results, one)["result"]["exc_type"] for one in sent.values()}
    assert errors <= {"EncodeError", "ConnectionError"}
    assert [stack.harness.started(f"{kind}-{pool}") for pool in POOLS] == [1, 1, 1]


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_failure_cannot_be_stored_runs_once(
    stack: Stack, results: RedisServer, workers: dict[str, Node], pool: str
) -> None:
    label = f"spoilt-{pool}"
    # Nothing is ever stored under a key that holds something else.
    results.client(1).rpush(f"celery-task-meta-{label}", "a list")

    stack.send("probe.mark", label, queue=pool, task_id=label)

    workers[pool].says(rf"results: FAILURE of {label} can never be stored", TIMEOUT_SECONDS)
    wait_acknowledged(stack)
    assert stack.harness.started(label) == 1


def test_a_stop_requeues_tasks_whose_results_are_not_stored_yet(stack: Stack, results: RedisServer) -> None:
    workers = {pool: stack.worker(WORKER_POOL=pool, WORKER_QUEUES=f"stop-{pool}") for pool in POOLS}
    for worker in workers.values():
        worker.ready()
    sent = {f"stop-{pool}": stack.send("probe.end", f"stop-{pool}", "returns", queue=f"stop-{pool}") for pool in POOLS}
    wait_running(stack, sent)
    # What the tests before have left is acknowledged by now.
    stack.harness.wait_until(lambda: stack.unacked() == len(sent), TIMEOUT_SECONDS, "nothing else is unacknowledged")
    break_redis(results, "killed")
    release(stack, sent)
    for worker in workers.values():
        worker.says(WAITS)

    for worker in workers.values():
        worker.process.terminate()

    # One that waited for the Redis of the results would never leave.
    assert [worker.exits(TIMEOUT_SECONDS) for worker in workers.values()] == [0, 0, 0]
    assert [stack.waiting(label) for label in sent] == [1, 1, 1]
    assert stack.unacked() == 0
    repair_redis(results, "killed")
    stack.worker(WORKER_POOL="threads", WORKER_QUEUES=",".join(sent)).ready()
    wait_results(stack, results, sent, dict.fromkeys(sent, "SUCCESS"))
    assert [stack.harness.started(label) for label in sent] == [2, 2, 2]


@pytest.mark.slow
def test_what_the_main_process_of_a_prefork_node_stores_is_stored_later_too(stack: Stack, results: RedisServer) -> None:
    """A time limit, a child that is gone, a revoked task, and a stop in the middle of it."""
    wanted = {"limited": "FAILURE", "lost": "FAILURE", "revoked": "REVOKED", "late": "SUCCESS", "stopped": None}
    workers = {
        label: stack.worker(WORKER_QUEUES=label, WORKER_HEARTBEAT_TIMEOUT=str(HEARTBEAT_TIMEOUT)) for label in wanted
    }
    for worker in workers.values():
        worker.ready()
    # The task with the limit has to start when Redis is away: until then, this one occupies its child process.
    stack.send("probe.hold", "before", queue="limited", ignore_result=True)
    sent = {
        "limited": stack.send("probe.overrun", "limited", queue="limited"),
        "lost": stack.send("probe.vanish", "lost", queue="lost"),
        "revoked": stack.send("probe.hold", "revoked", queue="revoked"),
        "late": stack.send("probe.end", "late", "returns", queue="late"),
        "stopped": stack.send("probe.vanish", "stopped", queue="stopped"),
    }
    wait_running(stack, ["before", "lost", "revoked", "late", "stopped"])
    break_redis(results, "killed")
    stack.client.control.revoke(sent["revoked"].id, terminate=True)
    release(stack, ["before", "lost", "late", "stopped"])
    for worker in workers.values():
        worker.says(WAITS)
    # Its soft time limit, of which a child hears by this signal, comes when it has ended and is not stored yet.
    ((_, child, _),) = stack.harness.notes("start", "late")
    os.kill(child, signal.SIGUSR1)
    workers["stopped"].process.terminate()

    assert workers["stopped"].exits(TIMEOUT_SECONDS) == 0
    assert stack.waiting("stopped") == 1
    del sent["stopped"], wanted["stopped"], workers["stopped"]
    stack.harness.holds_for(lambda: stack.unacked() == len(sent), KILLED_SECONDS, "nothing is acknowledged")
    # Their main loops wait, and their heartbeats go on.
    files = [worker.heartbeat() for worker in workers.values()]
    stack.harness.wait_until(lambda: {file.read_text() for file in files} == {"ready\n"}, TIMEOUT_SECONDS, "all live")
    assert [worker.process.count("watchdog: killing") for worker in workers.values()] == [0] * len(workers)
    repair_redis(results, "killed")
    wait_results(stack, results, sent, wanted)
    wait_acknowledged(stack)
    assert {label: stack.harness.started(label) for label in sent} == dict.fromkeys(sent, 1)
    errors = {label: read_result(results, sent[label])["result"]["exc_type"] for label in ("limited", "lost")}
    assert errors == {"limited": "TimeLimitExceeded", "lost": "WorkerLostError"}


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_retry_is_not_stored_over_the_end_of_a_later_try(stack: Stack, state: str) -> None:
    """The message of the retry is sent before its state is stored; a quick worker has ended the retry by then."""
    backend, task_id = create_app(load(stack.environment())).backend, uuid4().hex
    error = TaskRevokedError("not any more") if state == "REVOKED" else ValueError("in vain")

    def store(state: str, retries: int) -> str:
        request = Context(id=task_id, retries=retries)
        backend.store_result(task_id, "done" if state == "SUCCESS" else error, state, request=request)
        return str(backend.get_state(task_id))

    assert store("RETRY", 0) == "RETRY"
    assert store(state, 1) == state
    assert store("RETRY", 0) == state
    # A dead letter that is replayed goes on with the retries that it had.
    assert store("RETRY", 1) == ("SUCCESS" if state == "SUCCESS" else "RETRY")


def test_a_retry_is_stored_where_no_scripts_may_be_run(
    stack: Stack, results: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker waits until it gets a right that it needs; here it does without."""
    monkeypatch.setattr(RetryState, "in_worker", True)
    results.client().acl_setuser(
        "scriptless", enabled=True, nopass=True, keys="*", channels="*", categories=["+@all", "-@scripting"]
    )
    url = results.url(1, "x", "scriptless")
    backend, task_id = create_app(load(stack.environment(CELERY_RESULT_BACKEND=url))).backend, uuid4().hex

    backend.store_result(task_id, ValueError("once more"), "RETRY", request=Context(id=task_id, retries=0))

    assert backend.get_state(task_id) == "RETRY"
