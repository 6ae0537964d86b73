"""What no worker can run becomes a dead letter: nobody waits for it in vain, and it can be looked at and replayed."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import chain, chord, group

from services.broker.keys import (
    DEAD_LETTER,
    DEAD_LETTERS,
    DEAD_LETTERS_NEXT,
    DEAD_LETTERS_UNTOLD,
    get_lists,
)
from services.dead_letters import DeadLetter
from tests.integration.commands.test_call import services
from tests.support.checkout import Checkout
from tests.support.processes import children
from tests.support.world import Stack, World

pytestmark = pytest.mark.each_redis

PATIENCE = 120
LEASE = 6
DELIVERIES = 2
NOBODY = "nobody-listens"
# A letter that is told by the sweep of another process waits for the next one.
SWEEP_SECONDS = LEASE + PATIENCE


@pytest.fixture(scope="module")
def stack(shared_world: World) -> Stack:
    """A worker; one that keeps no dead letters but those it has to; and one for which there are too many already."""
    stack = shared_world.stack(WORKER_LEASE=str(LEASE), WORKER_MAX_DELIVERIES=str(DELIVERIES))
    workers = [
        stack.worker(WORKER_CONCURRENCY="2"),
        stack.worker(WORKER_QUEUES="none", WORKER_POOL="threads", WORKER_DEAD_LETTERS="none"),
        stack.worker(WORKER_QUEUES="full", WORKER_POOL="threads", WORKER_DEAD_LETTERS_MAX="1"),
    ]
    for worker in workers:
        worker.ready()
    park(stack, message("probe.mark"), NOBODY)
    return stack


def raw(stack: Stack) -> redis.Redis:
    """A client that shows bytes as they are."""
    return redis.Redis(port=stack.redis.port, password=stack.redis.password, socket_timeout=10)


def letters(stack: Stack) -> dict[int, dict[str, bytes]]:
    """Every dead letter."""
    with raw(stack) as client:
        ids = [int(number) for number in client.zrange(DEAD_LETTERS, 0, -1)]
        found = {number: client.hgetall(f"{DEAD_LETTER}{number}") for number in ids}
    return {number: {name.decode(): value for name, value in one.items()} for number, one in found.items()}


def letter_with(stack: Stack, text: bytes) -> tuple[int, dict[str, bytes]]:
    """The dead letter whose message has this text in it, once there is one."""

    def found() -> tuple[int, dict[str, bytes]] | None:
        return next(((number, one) for number, one in letters(stack).items() if text in one["message"]), None)

    return stack.world.wait_until(found, PATIENCE, f"a dead letter with {text!r} in it")


def message(task: str, *arguments: object, **changes: object) -> bytes:
    """A message as Celery writes it; `changes` are made to its outermost object."""
    task_id = str(uuid4())
    body = json.dumps([arguments, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    whole = {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id, "argsrepr": repr(arguments), "kwargsrepr": "{}"},
        "properties": {
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
            "body_encoding": "base64",
        },
    }
    return json.dumps(whole | changes).encode()


def fill(stack: Stack) -> None:
    """Allow its Redis half of the memory that it uses: how much an empty one needs differs between versions."""
    used = int(stack.redis.client().info("memory")["used_memory"])
    stack.redis.ask("CONFIG", "SET", "maxmemory", str(used // 2))


def id_of(raw_message: bytes) -> str:
    return str(json.loads(raw_message)["headers"]["id"])


def park(stack: Stack, raw_message: bytes, queue: str, *, told: bool = True) -> int:
    """Write a dead letter as lua/dead_letter.lua does."""
    with raw(stack) as client:
        number = int(client.incr(DEAD_LETTERS_NEXT))
        fields = {"message": raw_message, "queue": queue, "reason": "crashed", "detail": "a test"}
        client.hset(f"{DEAD_LETTER}{number}", mapping={**fields, "deliveries": 5, "parked_at": "1700000000.5"})
        client.zadd(DEAD_LETTERS, {str(number): number})
        if not told:
            client.sadd(DEAD_LETTERS_UNTOLD, number)
    return number


def failure(result: Any) -> BaseException:
    """What `get` raises; the test fails when it waits in vain."""
    with pytest.raises(Exception) as caught:
        result.get(timeout=PATIENCE)
    return caught.value


def reason(result: Any) -> str:
    """Why a task that we wait for became a dead letter."""
    error = failure(result)
    assert type(error).__name__ == "DeadLetter", repr(error)
    return str(error.args[0])


def sign(stack: Stack, task: str, *arguments: object, **options: Any) -> Any:
    return stack.client.signature(task, args=arguments, options=options)


# What becomes a dead letter, and who is told.


def test_a_task_that_no_worker_knows_is_kept_and_its_sender_is_told(stack: Stack) -> None:
    sent = stack.send("nobody.knows", 4, 3)

    assert reason(sent) == "unknown-task"
    number, letter = letter_with(stack, sent.id.encode())
    assert sent.result.args == ("unknown-task", letter["detail"].decode(), number)
    assert (letter["queue"], letter["deliveries"]) == (b"celery", b"1")


def test_a_client_without_stalk_gets_the_reason_too(stack: Stack, tmp_path: Path) -> None:
    sent = stack.send("nobody.knows")
    failure(sent)
    program = (
        "import sys; from celery import Celery; app = Celery(backend=sys.argv[1])\n"
        "try: app.AsyncResult(sys.argv[2]).get(timeout=100)\n"
        "except Exception as error: print(type(error).__module__, type(error).__name__, error.args[0])"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, stack.redis.url(1), sent.id],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    assert done.stdout.split() == ["celery.exceptions", "DeadLetter", "unknown-task"]


@pytest.mark.parametrize("module", ["services.dead_letters", "services.delivery.telling"])
def test_a_result_becomes_a_dead_letter_also_when_the_version_before_has_stored_it(stack: Stack, module: str) -> None:
    stored = {"exc_type": "DeadLetter", "exc_module": module, "exc_message": ["crashed", "it died", 7]}

    error = stack.client.backend.exception_to_python(stored)

    assert isinstance(error, DeadLetter)
    assert (error.reason, str(error)) == ("crashed", "crashed: it died (dead letter 7)")


PICKLED = base64.b64encode(b"\x80\x04N.").decode()
UNDECODABLE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not JSON": lambda: b"{no JSON " + uuid4().hex.encode(),
    "not UTF-8": lambda: b"\xff\xfe\x00" + uuid4().bytes,
    "10 MB": lambda: uuid4().hex.encode() * (10 * 2**20 // 32),
    "nested too deep": lambda: b"[" * 100_000 + b"]" * 100_000,
    "a number": lambda: b"7",
    "a list": lambda: b'[1, {"a": 1.0e+400}]',
    "no properties": lambda: b'{"headers": {}}',
    "properties of another kind": lambda: b'{"properties": []}',
    "no delivery info": lambda: b'{"properties": {}}',
    "headers of another kind": lambda: message("probe.mark", headers=[]),
    "no task in it": lambda: message("probe.mark", headers={}),
    "a name that is no text": lambda: message("probe.mark", headers={"task": 7, "id": "x"}),
}
UNDECODABLE_BODIES: dict[str, Callable[[], bytes]] = {
    "not base64": lambda: message("probe.mark", body="%"),
    "not JSON": lambda: message("probe.mark", body=base64.b64encode(b"[4, ").decode()),
    "of another shape": lambda: message("probe.mark", body=base64.b64encode(b"[[], {}]").decode()),
    "arguments of another kind": lambda: message("probe.mark", body=base64.b64encode(b"[7, {}, {}]").decode()),
    "a pickle": lambda: message("probe.mark", body=PICKLED, **{"content-type": "application/x-python-serialize"}),
    "of an unknown kind": lambda: message("probe.mark", **{"content-type": "application/x-nobody-knows"}),
}


@pytest.mark.parametrize("kind", UNDECODABLE)
def test_bytes_that_are_no_task_are_kept_unchanged(stack: Stack, kind: str) -> None:
    garbage = UNDECODABLE[kind]()
    before = set(letters(stack))
    with raw(stack) as client:
        client.lpush("celery", garbage)

    (number,) = stack.world.wait_until(lambda: set(letters(stack)) - before, PATIENCE, "a dead letter")

    letter = letters(stack)[number]
    assert (letter["message"], letter["reason"], letter["queue"]) == (garbage, b"undecodable", b"celery")
    with raw(stack) as client:
        stack.world.wait_until(
            lambda: not client.sismember(DEAD_LETTERS_UNTOLD, str(number)), PATIENCE, "nobody is left to tell"
        )
    assert stack.send("probe.mark", "after-garbage").get(timeout=PATIENCE) == "after-garbage"


def test_whoever_listens_for_rejected_messages_hears_of_one_that_is_no_task(stack: Stack) -> None:
    before = len(stack.world.notes("rejected"))
    with raw(stack) as client:
        client.lpush("celery", UNDECODABLE["no task in it"]())
    stack.world.wait_until(lambda: len(stack.world.notes("rejected")) > before, PATIENCE, "it is heard of")


@pytest.mark.parametrize("kind", UNDECODABLE_BODIES)
def test_a_task_whose_body_cannot_be_decoded_is_kept_and_its_sender_is_told(stack: Stack, kind: str) -> None:
    garbage = UNDECODABLE_BODIES[kind]()
    with raw(stack) as client:
        client.lpush("celery", garbage)

    assert reason(stack.client.AsyncResult(id_of(garbage))) == "undecodable"
    assert letter_with(stack, id_of(garbage).encode())[1]["message"] == garbage
    assert stack.send("probe.mark", "after-body").get(timeout=PATIENCE) == "after-body"


def test_a_task_that_kills_its_process_ends_after_the_allowed_deliveries(stack: Stack) -> None:
    sent = stack.send("probe.die", "poison")

    assert reason(sent) == "crashed"
    assert stack.world.started("poison") == DELIVERIES
    assert letter_with(stack, sent.id.encode())[1]["deliveries"] == str(DELIVERIES).encode()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_that_kills_its_whole_node_ends_after_the_allowed_deliveries(world: World, pool: str) -> None:
    stack = world.stack(WORKER_LEASE=str(LEASE), WORKER_MAX_DELIVERIES=str(DELIVERIES))
    sent = stack.send("probe.die", "poison")
    for time in range(DELIVERIES):
        node = stack.celery(f"worker --pool={pool} --hostname=node{time}@%h")
        node.exits(PATIENCE)

    stack.celery(f"worker --pool={pool} --hostname=last@%h")

    assert reason(sent) == "crashed"
    assert world.started("poison") == DELIVERIES
    assert stack.send("probe.mark", "after").get(timeout=PATIENCE) == "after"


# Celery makes the children that are missing each five seconds (celery 5.7).
POOL_SECONDS = 6.0
# The client of the results is made while somebody else is waited for; a lock is held meanwhile (kombu 5.7).
SLOW_CLIENT = """
import threading

from probe import wait_released
from services.results.backend import ResultBackend

make = ResultBackend._create_client


def create(self, **options):
    if threading.current_thread().name == "dead-letter-reporter":
        wait_released("telling")
    return make(self, **options)


ResultBackend._create_client = create
"""


def test_no_child_is_made_while_a_dead_letter_is_told_and_holds_locks(world: World, own_checkout: Checkout) -> None:
    world.checkout = own_checkout
    own_checkout.write("slow_client.py", SLOW_CLIENT)
    own_checkout.replace("services/dead_letters/reporter.py", "FORK_SECONDS = 1.0", "FORK_SECONDS = 600.0")
    stack = world.stack(WORKER_MAX_DELIVERIES="1", CELERY_IMPORTS="probe,slow_client")
    node = stack.celery("worker --concurrency=1 --loglevel=INFO --hostname=node0@%h").ready()
    poison = stack.send("probe.die", "poison")
    world.wait_started("telling")

    before = children(node.process.pid)
    stack.client.control.pool_grow(1)
    world.holds_for(lambda: children(node.process.pid) == before, POOL_SECONDS, "no child is made")
    world.release("telling")

    assert reason(poison) == "crashed"
    world.wait_until(lambda: len(children(node.process.pid)) == 2, PATIENCE, "there are two children")
    held = {label: stack.send("probe.hold", label) for label in ("one", "two")}
    for label in held:
        world.wait_started(label)
        world.release(label)
    assert [result.get(timeout=PATIENCE) for result in held.values()] == list(held)


def test_a_chord_a_chain_and_a_group_err_with_the_task_they_wait_for(stack: Stack) -> None:
    poison = sign(stack, "nobody.knows", 1)
    body = sign(stack, "probe.mark", "body", link_error=[sign(stack, "probe.mark", "chord-erred").set(immutable=True)])
    with stack.client.connection_for_write():
        asked = {
            "chord": chord([sign(stack, "probe.mark", "part"), poison], app=stack.client)(body),
            "chain": chain(poison, sign(stack, "probe.mark"), sign(stack, "probe.mark"), app=stack.client)(),
            "chord in a chain": chain(
                poison, chord([sign(stack, "probe.mark")] * 2, sign(stack, "probe.mark")), app=stack.client
            )(),
            "group": group([sign(stack, "probe.mark", "member"), poison], app=stack.client)(),
        }

    for what, result in asked.items():
        assert "unknown-task" in str(failure(result)), what
    stack.world.wait_started("chord-erred")
    assert stack.world.started("body") == 0


def test_an_errback_runs(stack: Stack) -> None:
    errback = sign(stack, "probe.mark", "errback").set(immutable=True)

    stack.send("nobody.knows", link_error=errback)

    stack.world.wait_started("errback")


def test_a_task_whose_last_retry_failed_is_kept_with_its_own_error(stack: Stack) -> None:
    sent = stack.send("probe.fail", "retried")

    assert isinstance(failure(sent), ValueError)
    _, letter = letter_with(stack, sent.id.encode())
    assert (letter["reason"], letter["detail"]) == (b"retries-exhausted", b"ValueError('as it always does')")
    assert stack.world.started("retried") == 2


def test_a_task_that_rejects_itself_is_kept(stack: Stack) -> None:
    sent = stack.send("probe.reject", "rejected")

    assert type(failure(sent)).__name__ == "Reject"
    assert letter_with(stack, sent.id.encode())[1]["reason"] == b"rejected"


def test_failed_and_rejected_tasks_are_not_kept_where_that_is_switched_off(stack: Stack) -> None:
    failed, rejected = (stack.send(f"probe.{task}", task, queue="none") for task in ("fail", "reject"))
    failure(failed)
    failure(rejected)

    # Those that nobody can run are kept in any case, and this one came last.
    unknown = stack.send("nobody.knows", queue="none")

    assert reason(unknown) == "unknown-task"
    texts = b"".join(letter["message"] for letter in letters(stack).values())
    assert failed.id.encode() not in texts
    assert rejected.id.encode() not in texts


def test_with_too_many_dead_letters_a_failed_task_is_not_kept_and_the_log_says_so(stack: Stack) -> None:
    failed = stack.send("probe.fail", "one-too-many", queue="full")
    assert isinstance(failure(failed), ValueError)
    unknown = stack.send("nobody.knows", queue="full")

    assert reason(unknown) == "unknown-task"
    stack.nodes[2].says("not kept, because there are 1 .WORKER_DEAD_LETTERS_MAX.: retries-exhausted: ValueError")
    assert failed.id.encode() not in b"".join(letter["message"] for letter in letters(stack).values())
    stack.world.wait_until(lambda: stack.unacked() == 0, PATIENCE, "both are acknowledged")


def test_a_task_is_told_by_another_worker_when_the_one_that_parked_it_has_died(stack: Stack) -> None:
    forgotten = message("nobody.knows")
    number = park(stack, forgotten, NOBODY, told=False)

    assert stack.client.AsyncResult(id_of(forgotten)).get(timeout=SWEEP_SECONDS, propagate=False).args[2] == number
    with raw(stack) as client:
        stack.world.wait_until(
            lambda: not client.sismember(DEAD_LETTERS_UNTOLD, str(number)), PATIENCE, "it is not told again"
        )


def test_a_task_of_which_another_copy_has_succeeded_stays_a_success(stack: Stack) -> None:
    errback = sign(stack, "probe.mark", "errback-of-copy").set(immutable=True)
    body = base64.b64encode(json.dumps([[], {}, {"errbacks": [errback]}]).encode()).decode()
    copy = message("probe.mark", body=body)
    stack.client.backend.store_result(id_of(copy), "done", "SUCCESS")

    number = park(stack, copy, NOBODY, told=False)

    with raw(stack) as client:
        stack.world.wait_until(
            lambda: not client.sismember(DEAD_LETTERS_UNTOLD, str(number)), SWEEP_SECONDS, "it is done with"
        )
    assert stack.client.AsyncResult(id_of(copy)).state == "SUCCESS"
    assert stack.world.started("errback-of-copy") == 0


def test_options_of_which_nothing_can_be_made_do_not_keep_others_from_being_told(stack: Stack) -> None:
    body = base64.b64encode(json.dumps([[], {}, {"errbacks": 7, "chord": 7, "chain": 7}]).encode()).decode()
    odd = message("nobody.knows", body=body)
    park(stack, odd, NOBODY, told=False)
    last = message("nobody.knows")
    park(stack, last, NOBODY, told=False)

    for one in (odd, last):
        error = stack.client.AsyncResult(id_of(one)).get(timeout=SWEEP_SECONDS, propagate=False)
        assert error.args[0] == "crashed"


@contextmanager
def events(stack: Stack) -> Iterator[list[dict[str, Any]]]:
    """The events of tasks, as Flower gets them."""
    seen: list[dict[str, Any]] = []
    with stack.client.connection_for_read() as connection:
        receiver = stack.client.events.Receiver(connection, handlers={"*": seen.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"timeout": None, "wakeup": False}, daemon=True)
        thread.start()
        # It hears heartbeats once it listens.
        stack.world.wait_until(lambda: seen, PATIENCE, "the first event")
        yield seen
        receiver.should_stop = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_flower_is_told_once(stack: Stack) -> None:
    with events(stack) as seen:
        sent = stack.send("nobody.knows")
        failure(sent)
        failed = stack.world.wait_until(
            lambda: [event for event in seen if event["type"] == "task-failed" and event["uuid"] == sent.id],
            PATIENCE,
            "the event",
        )

    assert len(failed) == 1
    assert "unknown-task" in failed[0]["exception"]
    assert failed[0]["hostname"].startswith("node0@")


# Looking at them.


@pytest.fixture
def quiet(world: World) -> Stack:
    """A Redis without workers."""
    return world.stack()


def test_the_latest_letters_are_listed_newest_last_and_the_rest_is_counted(quiet: Stack) -> None:
    ids = [park(quiet, message("probe.mark", number), "mail") for number in range(25)]

    latest, everything = (services(quiet, "dead-letters", *more) for more in ([], ["--all"]))

    assert (latest.code, everything.code) == (0, 0)
    assert [one["id"] for one in latest.said["dead_letters"]] == ids[5:]
    assert latest.said["more"] == 5
    assert [one["id"] for one in everything.said["dead_letters"]] == ids
    assert everything.said["more"] == 0
    shown = latest.said["dead_letters"][0]
    assert datetime.fromisoformat(shown.pop("when")).timestamp() == 1700000000
    assert shown == {
        "id": ids[5],
        "reason": "crashed",
        "task": "probe.mark",
        "task_id": id_of(letters(quiet)[ids[5]]["message"]),
        "queue": "mail",
        "deliveries": 5,
        "detail": "a test",
    }


def test_one_letter_is_shown_with_its_arguments(quiet: Stack) -> None:
    number = park(quiet, message("probe.mark", "x", {"y": [1.5]}), "mail")

    answer = services(quiet, "dead-letters", str(number))

    assert answer.code == 0
    assert (answer.said["args"], answer.said["kwargs"]) == (["x", {"y": [1.5]}], {})
    assert answer.said["headers"]["argsrepr"] == "('x', {'y': [1.5]})"
    assert "message" not in answer.said


def test_a_letter_that_cannot_be_decoded_is_shown_byte_by_byte(quiet: Stack) -> None:
    number = park(quiet, b'{"caf\xc3\xa9\xff": \x1b[31m', "mail")

    answer = services(quiet, "dead-letters", str(number))

    assert answer.code == 0
    assert (answer.said["task"], answer.said["args"]) == (None, None)
    assert answer.said["message"] == r'{"caf\xe9\\xff": \x1b[31m'
    assert answer.said["problem"].startswith("not a message")


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("dead-letters 7", 1, "there is no dead letter 7: see 'make dead-letters'"),
        ("replay 7", 1, "there is no dead letter 7: see 'make dead-letters'"),
        ("replay 7 9", 1, "there are no dead letters 7, 9: see 'make dead-letters'"),
        ("replay 7,9", 1, "there are no dead letters 7, 9: see 'make dead-letters'"),
        ("dead-letters 7,9", 2, "ID: found '7,9'; it must be one number, such as 7"),
        ("dead-letters x", 2, "ID: found 'x'; it must be the number of a dead letter, such as 7"),
        ("replay x", 2, "ID: found 'x'; it must be the number of a dead letter, such as 7"),
        ("replay", 2, "say which dead letters: make replay ID=7, or ID=7,9, or ALL=1 for all"),
        ("replay 7 --all", 2, "say which dead letters: make replay ID=7, or ID=7,9, or ALL=1 for all"),
        ("purge-dead-letters", 2, "this deletes all dead letters, and nobody can be asked: run 'make purge-dead"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_done(
    quiet: Stack, command: str, code: int, error: str
) -> None:
    number = park(quiet, message("probe.mark"), "mail")

    done = quiet.world.answer(["-m", "services", *command.split()], quiet.environment(), PATIENCE)

    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1
    assert list(letters(quiet)) == [number]


@pytest.mark.parametrize("command", ["status", "dead-letters", "dead-letters 1", "replay --all", "to-plain"])
def test_a_redis_that_is_away_is_said_with_exit_code_1(quiet: Stack, command: str) -> None:
    quiet.redis.stop()

    answer = services(quiet, *command.split())

    assert answer.code == 1
    assert answer.said["error"].startswith("Redis refuses: " if "replay" in command else "Redis does not answer: ")
    assert answer.errors == f"error: {answer.said['error']}\n"


# Replay.


def test_a_replayed_task_runs_and_its_failure_becomes_a_success(stack: Stack) -> None:
    cure = stack.world.path("cure")
    sent = stack.send("probe.die", "cured", str(cure))
    assert reason(sent) == "crashed"
    number, _ = letter_with(stack, sent.id.encode())
    cure.touch()

    answer = services(stack, "replay", str(number))

    assert (answer.code, answer.said) == (0, {"replayed": [number]})
    stack.world.wait_until(lambda: stack.client.AsyncResult(sent.id).state == "SUCCESS", PATIENCE, "it succeeds")
    assert number not in letters(stack)
    # Not counted from where it was: it had used up its deliveries.
    assert stack.nodes[0].process.count(rf"{sent.id}\]: delivery") == DELIVERIES - 1


def test_the_later_links_of_a_chain_run_after_its_replay(stack: Stack) -> None:
    cure = stack.world.path("cure")
    first, second = sign(stack, "probe.die", "first-link", str(cure)), sign(stack, "probe.mark", "second-link")
    sent = chain(first, second.set(immutable=True), app=stack.client)()
    assert reason(sent) == "crashed"
    cure.touch()

    services(stack, "replay", str(letter_with(stack, sent.parent.id.encode())[0]))

    stack.world.wait_until(lambda: stack.client.AsyncResult(sent.id).state == "SUCCESS", PATIENCE, "the chain ends")


def test_a_chord_whose_part_is_replayed_stays_failed(stack: Stack) -> None:
    cure = stack.world.path("cure")
    parts = [sign(stack, "probe.die", "part", str(cure)), sign(stack, "probe.mark", "other-part")]
    sent = chord(parts, app=stack.client)(sign(stack, "probe.mark", "replayed-body"))
    failure(sent)
    part = sent.parent.results[0]
    cure.touch()

    services(stack, "replay", str(letter_with(stack, part.id.encode())[0]))

    stack.world.wait_until(lambda: stack.client.AsyncResult(part.id).state == "SUCCESS", PATIENCE, "the part succeeds")
    assert stack.client.AsyncResult(sent.id).state == "FAILURE"
    assert stack.world.started("replayed-body") == 0


def test_a_replay_leaves_the_message_as_its_sender_wrote_it(quiet: Stack) -> None:
    plain = b'{"properties": {"priority": 6}, "odd": 1.0e+5, "e": {}, "n": [ ]}'
    counted = b'{"delivery_count":5,' + plain[1:]
    no_json = b'{"delivery_count":5,no JSON'
    never_counted = b"\xff no JSON \x00"
    for one in (counted, no_json, never_counted):
        park(quiet, one, "mail")

    answer = services(quiet, "replay", "--all")

    assert answer.code == 0
    assert letters(quiet) == {}
    with raw(quiet) as client:
        first, *_, third, fourth = get_lists("mail")
        assert client.lrange(third, 0, -1) == [plain]
        # As new arrivals, in the order in which they were parked.
        assert client.lrange(first, 0, -1) == [never_counted, b"{no JSON"]
        assert client.exists(fourth, DEAD_LETTERS, DEAD_LETTERS_UNTOLD) == 0


def test_a_replay_of_many_replays_all_of_them(quiet: Stack) -> None:
    ids = [park(quiet, message("probe.mark", number), "mail") for number in range(250)]

    answer = services(quiet, "replay", "--all")

    assert answer.said == {"replayed": ids}
    assert quiet.waiting("mail") == 250


def test_letters_that_exist_are_replayed_beside_one_that_does_not(quiet: Stack) -> None:
    number = park(quiet, message("probe.mark"), "mail")

    answer = services(quiet, "replay", "99", str(number))

    assert (answer.code, answer.said["replayed"]) == (1, [number])
    assert answer.said["error"].startswith("there is no dead letter 99")


def test_a_full_redis_refuses_a_replay_whole(quiet: Stack) -> None:
    ids = [park(quiet, message("probe.mark"), "mail") for _ in range(2)]
    fill(quiet)

    answer = services(quiet, "replay", "--all")

    assert answer.code == 1
    assert answer.said["error"].startswith("Redis refuses: ")
    assert answer.said["error"].endswith("nothing was replayed")
    assert "maxmemory" in answer.said["error"]
    assert list(letters(quiet)) == ids
    assert quiet.waiting("mail") == 0


# Purge.


def test_a_purge_deletes_all_letters_and_says_how_many(quiet: Stack) -> None:
    for number in range(250):
        park(quiet, message("probe.mark", number), "mail")

    answer = services(quiet, "purge-dead-letters", "--yes")

    assert (answer.code, answer.said) == (0, {"purged": 250})
    with raw(quiet) as client:
        assert client.keys("dead_letter*") == [DEAD_LETTERS_NEXT.encode()]


def test_a_purge_tells_tasks_that_have_not_been_told(quiet: Stack) -> None:
    untold = message("probe.mark")
    park(quiet, untold, "mail", told=False)
    park(quiet, b"no task", "mail", told=False)

    answer = services(quiet, "purge-dead-letters", "--yes")

    assert (answer.code, answer.said) == (0, {"purged": 2})
    assert reason(quiet.client.AsyncResult(id_of(untold))) == "crashed"


def test_a_full_redis_can_be_purged(quiet: Stack) -> None:
    park(quiet, message("probe.mark"), "mail")
    fill(quiet)

    answer = services(quiet, "purge-dead-letters", "--yes")

    assert (answer.code, answer.said) == (0, {"purged": 1})
