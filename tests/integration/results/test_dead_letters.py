"""What no worker can run becomes a dead letter: nobody waits for it in vain, and it can be looked at and replayed."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import chain, chord, group

from services.broker import keys
from services.dead_letters import DeadLetter
from tests.integration.commands.test_call import services
from tests.integration.delivery.commands import build_task
from tests.support.checkout import Checkout
from tests.support.harness import Harness, Stack
from tests.support.processes import children
from tests.support.waiting import TIMEOUT_SECONDS

pytestmark = pytest.mark.each_redis

LEASE = 6
DELIVERIES = 2
NOBODY = "nobody-listens"
# A letter that is told by the sweep of another process waits for the next one.
SWEEP_SECONDS = LEASE + TIMEOUT_SECONDS


@pytest.fixture(scope="module")
def stack(shared_harness: Harness) -> Stack:
    """A worker; one that keeps no dead letters but those it has to; and one for which there are too many already."""
    stack = shared_harness.stack(WORKER_LEASE=str(LEASE), WORKER_MAX_DELIVERIES=str(DELIVERIES))
    workers = [
        stack.worker(WORKER_CONCURRENCY="2"),
        stack.worker(WORKER_QUEUES="none", WORKER_POOL="threads", WORKER_DEAD_LETTERS="none"),
        stack.worker(WORKER_QUEUES="full", WORKER_POOL="threads", WORKER_DEAD_LETTERS_MAX="1"),
    ]
    for worker in workers:
        worker.ready()
    park(stack, message("probe.mark"), NOBODY)
    return stack


def letters(stack: Stack) -> dict[int, dict[str, bytes]]:
    """Every dead letter."""
    with redis.Redis(port=stack.redis.port, password=stack.redis.password) as client:
        ids = [int(number) for number in client.zrange(keys.DEAD_LETTERS, 0, -1)]
        found = {number: client.hgetall(f"{keys.DEAD_LETTER}{number}") for number in ids}
    return {number: {name.decode(): value for name, value in one.items()} for number, one in found.items()}


def letter_with(stack: Stack, text: bytes) -> tuple[int, dict[str, bytes]]:
    """The dead letter whose message has this text in it, once there is one."""

    def found() -> tuple[int, dict[str, bytes]] | None:
        return next(((number, one) for number, one in letters(stack).items() if text in one["message"]), None)

    return stack.harness.wait_until(found, TIMEOUT_SECONDS, f"a dead letter with {text!r} in it")


def message(task: str, *arguments: object, **changes: object) -> bytes:
    """A message as Celery writes it; `changes` are made to its outermost object."""
    options = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    built = build_task([arguments, {}, options], task=task, argsrepr=repr(arguments), kwargsrepr="{}")
    return json.dumps(json.loads(built) | changes).encode()


def id_of(raw_message: bytes) -> str:
    return str(json.loads(raw_message)["headers"]["id"])


def park(stack: Stack, raw_message: bytes, queue: str, *, reported: bool = True) -> int:
    """Write a dead letter as lua/dead_letter.lua does."""
    client: Any = stack.redis.client()
    number = int(client.incr(keys.DEAD_LETTERS_NEXT))
    fields = {"message": raw_message, "queue": queue, "reason": "crashed", "detail": "a test"}
    client.hset(f"{keys.DEAD_LETTER}{number}", mapping={**fields, "deliveries": 5, "parked_at": "1700000000.5"})
    client.zadd(keys.DEAD_LETTERS, {str(number): number})
    if not reported:
        client.sadd(keys.DEAD_LETTERS_UNTOLD, number)
    return number


def wait_reported(stack: Stack, *numbers: int) -> None:
    """Wait until nobody is left who has to be told of these dead letters."""
    client: Any = stack.redis.client()
    reported = lambda: not any(client.smismember(keys.DEAD_LETTERS_UNTOLD, numbers))  # noqa: E731
    stack.harness.wait_until(reported, SWEEP_SECONDS, f"{numbers} are reported")


def failure(result: Any) -> BaseException:
    """What `get` raises; the test fails when it waits in vain."""
    with pytest.raises(Exception) as caught:
        result.get(timeout=TIMEOUT_SECONDS)
    return caught.value


def reason(result: Any) -> str:
    """Why a task that we wait for became a dead letter."""
    error = failure(result)
    assert type(error).__name__ == "DeadLetter", repr(error)
    return str(error.args[0])


def sign(stack: Stack, task: str, *arguments: object, **options: Any) -> Any:
    return stack.client.signature(task, args=arguments, options=options)


# What becomes a dead letter, and who is told.


def test_a_task_that_no_worker_knows_is_kept_and_its_sender_is_told(stack: Stack, tmp_path: Path) -> None:
    errback = sign(stack, "probe.mark", "errback").set(immutable=True)

    sent = stack.send("nobody.knows", 4, 3, link_error=errback)

    assert reason(sent) == "unknown-task"
    number, letter = letter_with(stack, sent.id.encode())
    assert sent.result.args == ("unknown-task", letter["detail"].decode(), number)
    assert (letter["queue"], letter["deliveries"]) == (b"celery", b"1")
    stack.harness.wait_started("errback")
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
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    assert done.stdout.split() == ["celery.exceptions", "DeadLetter", "unknown-task"]


@pytest.mark.parametrize("module", ["services.dead_letters", "services.delivery.telling"])
def test_a_result_becomes_a_dead_letter_also_when_the_version_before_has_stored_it(stack: Stack, module: str) -> None:
    stored = {"exc_type": "DeadLetter", "exc_module": module, "exc_message": ["crashed", "it died", 7]}

    error = stack.client.backend.exception_to_python(stored)

    assert isinstance(error, DeadLetter)
    assert (error.reason, str(error)) == ("crashed", "crashed: it died (dead letter 7)")


# Makes a directory when it is unpickled.
UNPICKLED = Path(gettempdir()) / uuid4().hex
PICKLED = base64.b64encode(b"cos\nmkdir\n(S'%s'\ntR." % bytes(UNPICKLED)).decode()
IS_PICKLED = {"content-type": "application/x-python-serialize", "content-encoding": "binary"}
UNDECODABLE_BODIES: dict[str, Callable[[], bytes]] = {
    "not base64": lambda: message("probe.mark", body="%"),
    "not JSON": lambda: message("probe.mark", body=base64.b64encode(b"[4, ").decode()),
    "of another shape": lambda: message("probe.mark", body=base64.b64encode(b"[[], {}]").decode()),
    "arguments of another kind": lambda: message("probe.mark", body=base64.b64encode(b"[7, {}, {}]").decode()),
    "a pickle": lambda: message("probe.mark", body=PICKLED, **IS_PICKLED),
    "of an unknown kind": lambda: message("probe.mark", **{"content-type": "application/x-nobody-knows"}),
}


def test_a_message_that_is_no_task_is_kept_unchanged_and_whoever_listens_hears_of_it(stack: Stack) -> None:
    # What is no message at all is in tests/integration/delivery/test_fuzz.py.
    whole = message("probe.mark", uuid4().hex, headers={})
    stack.redis.client().lpush("celery", whole)
    number, letter = letter_with(stack, whole)

    assert (letter["message"], letter["reason"], letter["queue"]) == (whole, b"undecodable", b"celery")
    stack.harness.wait_until(lambda: stack.harness.notes("rejected"), TIMEOUT_SECONDS, "it is heard of")
    wait_reported(stack, number)


@pytest.mark.parametrize("kind", UNDECODABLE_BODIES)
def test_a_task_whose_body_cannot_be_decoded_is_kept_and_its_sender_is_told(stack: Stack, kind: str) -> None:
    garbage = UNDECODABLE_BODIES[kind]()
    stack.redis.client().lpush("celery", garbage)

    assert reason(stack.client.AsyncResult(id_of(garbage))) == "undecodable"
    letter = letter_with(stack, id_of(garbage).encode())[1]
    assert letter["message"] == garbage
    assert (b"ContentDisallowed" in letter["detail"]) == (kind in ("a pickle", "of an unknown kind")), letter["detail"]
    assert not UNPICKLED.exists()
    assert stack.send("probe.mark", "after-body").get(timeout=TIMEOUT_SECONDS) == "after-body"


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_task_that_kills_its_whole_node_ends_after_the_allowed_deliveries(harness: Harness, pool: str) -> None:
    stack = harness.stack(WORKER_LEASE=str(LEASE), WORKER_MAX_DELIVERIES=str(DELIVERIES))
    sent = stack.send("probe.die", "poison")
    for time in range(DELIVERIES):
        node = stack.celery(f"worker --pool={pool} --hostname=node{time}@%h")
        node.exits(TIMEOUT_SECONDS)

    stack.celery(f"worker --pool={pool} --hostname=last@%h")

    assert reason(sent) == "crashed"
    assert harness.started("poison") == DELIVERIES
    assert stack.send("probe.mark", "after").get(timeout=TIMEOUT_SECONDS) == "after"


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


def test_no_child_is_made_while_a_dead_letter_is_told_and_holds_locks(harness: Harness, own_checkout: Checkout) -> None:
    harness.checkout = own_checkout
    own_checkout.write("slow_client.py", SLOW_CLIENT)
    own_checkout.replace("services/dead_letters/reporter.py", "FORK_SECONDS = 1.0", "FORK_SECONDS = 600.0")
    stack = harness.stack(WORKER_MAX_DELIVERIES="1", CELERY_IMPORTS="probe,slow_client")
    node = stack.celery("worker --concurrency=1 --loglevel=INFO --hostname=node0@%h").ready()
    poison = stack.send("probe.die", "poison")
    harness.wait_started("telling")

    before = children(node.process.pid)
    stack.client.control.pool_grow(1)
    harness.holds_for(lambda: children(node.process.pid) == before, POOL_SECONDS, "no child is made")
    harness.release("telling")

    assert reason(poison) == "crashed"
    harness.wait_until(lambda: len(children(node.process.pid)) == 2, TIMEOUT_SECONDS, "there are two children")
    sent = {label: stack.send("probe.hold", label) for label in ("one", "two")}
    for label in sent:
        harness.wait_started(label)
        harness.release(label)
    assert [result.get(timeout=TIMEOUT_SECONDS) for result in sent.values()] == list(sent)


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
    stack.harness.wait_started("chord-erred")
    assert stack.harness.started("body") == 0


@pytest.mark.parametrize(
    ("task", "error", "kept", "starts"),
    [
        ("fail", "ValueError", (b"retries-exhausted", b"ValueError('as it always does')"), 2),
        ("reject", "Reject", (b"rejected", b"rejected by its task"), 1),
    ],
    ids=["its last retry has failed", "it rejects itself"],
)
def test_a_task_that_has_failed_for_good_is_kept_with_its_own_error(
    stack: Stack, task: str, error: str, kept: tuple[bytes, bytes], starts: int
) -> None:
    sent = stack.send(f"probe.{task}", f"{task}-kept")

    assert type(failure(sent)).__name__ == error
    _, letter = letter_with(stack, sent.id.encode())
    assert (letter["reason"], letter["detail"]) == kept
    assert stack.harness.started(f"{task}-kept") == starts


@pytest.mark.parametrize("queue", ["none", "full"])
def test_where_it_is_switched_off_or_full_only_what_nobody_can_run_is_kept(stack: Stack, queue: str) -> None:
    failed = [stack.send(f"probe.{task}", f"{task}-{queue}", queue=queue) for task in ("fail", "reject")]
    assert [type(failure(one)).__name__ for one in failed] == ["ValueError", "Reject"]

    # It came last.
    assert reason(stack.send("nobody.knows", queue=queue)) == "unknown-task"

    kept = b"".join(letter["message"] for letter in letters(stack).values())
    assert [one for one in failed if one.id.encode() in kept] == []
    if queue == "full":
        stack.nodes[2].says("not kept, because there are 1 .WORKER_DEAD_LETTERS_MAX.: retries-exhausted: ValueError")
    stack.harness.wait_until(lambda: stack.unacked() == 0, TIMEOUT_SECONDS, "all are acknowledged")


def with_options(**options: object) -> bytes:
    """A message that no worker knows a task for, with these options of Celery's."""
    body = base64.b64encode(json.dumps([[], {}, options]).encode()).decode()
    return message("nobody.knows", body=body)


def test_the_sender_is_told_by_another_worker_when_the_one_that_parked_the_task_has_died(stack: Stack) -> None:
    """However odd the options of another one are; a task of which another copy has succeeded stays a success."""
    odd, plain = with_options(errbacks=7, chord=7, chain=7), message("nobody.knows")
    copy = with_options(errbacks=[sign(stack, "probe.mark", "errback-of-copy").set(immutable=True)])
    stack.client.backend.store_result(id_of(copy), "done", "SUCCESS")

    numbers = [park(stack, one, NOBODY, reported=False) for one in (odd, copy, plain)]

    for one, number in ((odd, numbers[0]), (plain, numbers[2])):
        error = stack.client.AsyncResult(id_of(one)).get(timeout=SWEEP_SECONDS, propagate=False)
        assert (error.args[0], error.args[2]) == ("crashed", number)
    wait_reported(stack, *numbers)
    assert stack.client.AsyncResult(id_of(copy)).state == "SUCCESS"
    assert stack.harness.started("errback-of-copy") == 0


@contextmanager
def events(stack: Stack) -> Iterator[list[dict[str, Any]]]:
    """The events of tasks, as Flower gets them."""
    heard: list[dict[str, Any]] = []
    with stack.client.connection_for_read() as connection:
        receiver = stack.client.events.Receiver(connection, handlers={"*": heard.append})
        thread = threading.Thread(target=receiver.capture, kwargs={"timeout": None, "wakeup": False}, daemon=True)
        thread.start()
        # It hears heartbeats once it listens.
        stack.harness.wait_until(lambda: heard, TIMEOUT_SECONDS, "the first event")
        yield heard
        receiver.should_stop = True
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()


def test_flower_is_told_once(stack: Stack) -> None:
    with events(stack) as heard:
        sent = stack.send("nobody.knows")
        failure(sent)
        failed = stack.harness.wait_until(
            lambda: [event for event in heard if event["type"] == "task-failed" and event["uuid"] == sent.id],
            TIMEOUT_SECONDS,
            "the event",
        )

    assert len(failed) == 1
    assert "unknown-task" in failed[0]["exception"]
    assert failed[0]["hostname"].startswith("node0@")


# Looking at them.


@pytest.fixture
def bare(harness: Harness) -> Stack:
    """A Redis without workers."""
    return harness.stack()


def test_many_letters_are_replayed_and_listed_newest_last_by_twenty_with_a_count_of_the_rest(bare: Stack) -> None:
    ids = [park(bare, message("probe.mark", number), "mail") for number in range(250)]

    latest, everything = (services(bare, "dead-letters", *more) for more in ([], ["--all"]))

    assert (latest.code, everything.code) == (0, 0)
    assert [one["id"] for one in latest.data["dead_letters"]] == ids[-20:]
    assert latest.data["more"] == 230
    assert [one["id"] for one in everything.data["dead_letters"]] == ids
    assert everything.data["more"] == 0
    oldest = latest.data["dead_letters"][0]
    assert datetime.fromisoformat(oldest.pop("when")).timestamp() == 1700000000
    assert oldest == {
        "id": ids[-20],
        "reason": "crashed",
        "task": "probe.mark",
        "task_id": id_of(letters(bare)[ids[-20]]["message"]),
        "queue": "mail",
        "deliveries": 5,
        "detail": "a test",
    }
    assert services(bare, "replay", "--all").data == {"replayed": ids}
    assert bare.waiting("mail") == 250


def test_one_letter_is_shown_with_its_arguments_or_byte_by_byte(bare: Stack) -> None:
    number = park(bare, message("probe.mark", "x", {"y": [1.5]}), "mail")

    broken = park(bare, b'{"caf\xc3\xa9\xff": \x1b[31m', "mail")

    answer, of_broken = (services(bare, "dead-letters", str(one)) for one in (number, broken))

    assert (answer.code, of_broken.code) == (0, 0)
    assert (answer.data["args"], answer.data["kwargs"]) == (["x", {"y": [1.5]}], {})
    assert answer.data["headers"]["argsrepr"] == "('x', {'y': [1.5]})"
    assert "message" not in answer.data
    assert (of_broken.data["task"], of_broken.data["args"]) == (None, None)
    assert of_broken.data["message"] == r'{"caf\xe9\\xff": \x1b[31m'
    assert of_broken.data["problem"].startswith("not a message")


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
def test_what_cannot_be_done_is_one_sentence(bare: Stack, command: str, code: int, error: str) -> None:
    number = park(bare, message("probe.mark"), "mail")

    done = bare.harness.answer(["-m", "services", *command.split()], bare.environment(), TIMEOUT_SECONDS)

    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1
    assert list(letters(bare)) == [number]


@pytest.mark.parametrize("command", ["status", "dead-letters", "dead-letters 1", "replay --all", "to-plain"])
def test_a_redis_that_is_away_is_said_with_exit_code_1(bare: Stack, command: str) -> None:
    bare.redis.stop()

    answer = services(bare, *command.split())

    assert answer.code == 1
    assert answer.data["error"].startswith("Redis refuses: " if "replay" in command else "Redis does not answer: ")
    assert answer.errors == f"error: {answer.data['error']}\n"


# Replay.


def test_a_task_that_kills_its_process_ends_after_the_allowed_deliveries_and_is_replayed(stack: Stack) -> None:
    cure = stack.harness.path("cure")
    sent = stack.send("probe.die", "cured", str(cure))
    assert reason(sent) == "crashed"
    assert stack.harness.started("cured") == DELIVERIES
    number, letter = letter_with(stack, sent.id.encode())
    assert letter["deliveries"] == str(DELIVERIES).encode()
    cure.touch()

    answer = services(stack, "replay", str(number))

    assert (answer.code, answer.data) == (0, {"replayed": [number]})
    stack.harness.wait_until(
        lambda: stack.client.AsyncResult(sent.id).state == "SUCCESS", TIMEOUT_SECONDS, "it succeeds"
    )
    assert number not in letters(stack)
    # Not counted from where it was: it had used up its deliveries.
    assert stack.nodes[0].process.count(rf"{sent.id}\]: delivery") == DELIVERIES - 1


def test_after_its_replay_the_later_links_of_a_chain_run_and_a_chord_stays_failed(stack: Stack) -> None:
    cure = stack.harness.path("cure")
    link, part = (sign(stack, "probe.die", label, str(cure)) for label in ("first-link", "part"))
    chained = chain(link, sign(stack, "probe.mark", "second-link").set(immutable=True), app=stack.client)()
    merged = chord([part, sign(stack, "probe.mark", "other")], app=stack.client)(sign(stack, "probe.mark", "body"))
    assert reason(chained) == "crashed"
    failure(merged)
    cure.touch()

    replayed = [chained.parent, merged.parent.results[0]]
    services(stack, "replay", *(str(letter_with(stack, one.id.encode())[0]) for one in replayed))

    def state(one: Any) -> str:
        """What is stored of it; the result itself knows of the end before."""
        return str(stack.client.AsyncResult(one.id).state)

    succeed = (*replayed, chained)
    stack.harness.wait_until(lambda: {*map(state, succeed)} == {"SUCCESS"}, TIMEOUT_SECONDS, "all of them succeed")
    assert state(merged) == "FAILURE"
    assert stack.harness.started("body") == 0


def test_a_replay_leaves_each_message_as_its_sender_wrote_it_beside_one_that_does_not_exist(bare: Stack) -> None:
    plain = b'{"properties": {"priority": 6}, "odd": 1.0e+5, "e": {}, "n": [ ]}'
    counted = b'{"delivery_count":5,' + plain[1:]
    no_json = b'{"delivery_count":5,no JSON'
    never_counted = b"\xff no JSON \x00"
    ids = [park(bare, one, "mail") for one in (counted, no_json, never_counted)]

    answer = services(bare, "replay", "99", *map(str, ids))

    assert (answer.code, answer.data["replayed"]) == (1, ids)
    assert answer.data["error"].startswith("there is no dead letter 99")
    assert letters(bare) == {}
    with redis.Redis(port=bare.redis.port, password=bare.redis.password) as client:
        first, *_, third, fourth = keys.get_lists("mail")
        assert client.lrange(third, 0, -1) == [plain]
        # As new arrivals, in the order in which they were parked.
        assert client.lrange(first, 0, -1) == [never_counted, b"{no JSON"]
        assert client.exists(fourth, keys.DEAD_LETTERS, keys.DEAD_LETTERS_UNTOLD) == 0


def test_a_full_redis_refuses_a_replay_whole_and_can_be_purged(bare: Stack) -> None:
    ids = [park(bare, message("probe.mark"), "mail") for _ in range(2)]
    bare.redis.fill(2)

    answer = services(bare, "replay", "--all")

    assert answer.code == 1
    assert answer.data["error"].startswith("Redis refuses: ")
    assert answer.data["error"].endswith("nothing was replayed")
    assert "maxmemory" in answer.data["error"]
    assert list(letters(bare)) == ids
    assert bare.waiting("mail") == 0
    purged = services(bare, "purge-dead-letters", "--yes")
    assert (purged.code, purged.data) == (0, {"purged": 2})


def test_a_purge_deletes_all_letters_says_how_many_and_tells_who_has_not_been_told(bare: Stack) -> None:
    untold = message("probe.mark")
    for one in (untold, b"no task"):
        park(bare, one, "mail", reported=False)
    for number in range(250):
        park(bare, message("probe.mark", number), "mail")

    answer = services(bare, "purge-dead-letters", "--yes")

    assert (answer.code, answer.data) == (0, {"purged": 252})
    assert reason(bare.client.AsyncResult(id_of(untold))) == "crashed"
    assert bare.redis.client().keys("dead_letter*") == [keys.DEAD_LETTERS_NEXT]
