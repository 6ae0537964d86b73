"""What is revoked never runs, whoever lived or heard it then: it is kept in Redis, and each node reads it there."""

import os
import signal
from collections.abc import Callable
from time import time
from typing import Any

import pytest
import redis
from celery import chord
from celery.exceptions import TaskRevokedError
from celery.utils.collections import LimitedSet
from celery.worker import state as worker_state

from services.broker.keys import REVOKED_STAMPS, REVOKED_TASKS, SCHEDULED
from services.control import revocations
from tests.integration.delivery.test_scheduled import start
from tests.integration.results.test_dead_letters import events
from tests.support.harness import Harness, Node, Stack
from tests.support.waiting import TIMEOUT_SECONDS, wait_until
from tests.support.workers import POOLS, stop

LEASE = 3
HOUR = 3600
NODE = f"node0@{os.uname().nodename}"


@pytest.fixture
def stack(harness: Harness) -> Stack:
    """A Redis without nodes."""
    return harness.stack(WORKER_LEASE=str(LEASE))


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def wait_listening(stack: Stack, one: Node, name: str = "node0") -> Node:
    """Wait until a node hears what is broadcast: it says that it is ready a moment before."""
    inspect = stack.client.control.inspect([f"{name}@{os.uname().nodename}"], timeout=1)
    stack.harness.wait_until(inspect.ping, TIMEOUT_SECONDS, f"{name} hears")
    return one


def client(stack: Stack, code: str) -> str:
    """What a client with this application does; what it says on standard error."""
    done = stack.harness.answer(["-c", f"from services.app import app; {code}"], stack.environment(), TIMEOUT_SECONDS)
    assert done.returncode == 0, done
    return done.stderr


def revoke(stack: Stack, *sent: Any) -> None:
    client(stack, f"app.control.revoke({[one.id for one in sent]!r})")


def hold(stack: Stack, **options: Any) -> Any:
    """A task that runs until it is released."""
    sent = stack.send("probe.hold", "held", **options)
    stack.harness.wait_started("held")
    return sent


def never_runs(stack: Stack, *sent: Any) -> None:
    """Wait until what is sent after them has run; they say REVOKED, and nobody holds anything."""
    stack.send("probe.mark", "after")
    stack.harness.wait_started("after")
    stack.harness.wait_until(lambda: stack.waiting() + stack.unacked() == 0, TIMEOUT_SECONDS, "nothing is left")
    assert [one.state for one in sent] == ["REVOKED"] * len(sent)
    assert not stack.harness.started("victim")
    for one in sent:
        with pytest.raises(TaskRevokedError):
            one.get(timeout=TIMEOUT_SECONDS)


def test_what_is_revoked_while_the_only_node_is_stopped_never_runs_and_waits_no_longer(stack: Stack, pool: str) -> None:
    client, harness = stack.redis.client(), stack.harness
    first = start(stack, pool)
    later, kept = (stack.send("probe.mark", label, countdown=HOUR) for label in ("victim", "kept"))
    harness.wait_until(lambda: client.zcard(SCHEDULED) == 2, TIMEOUT_SECONDS, "both wait in Redis")
    stop(first)
    victim = stack.send("probe.mark", "victim")
    revoke(stack, victim, later)

    start(stack, pool)

    harness.wait_until(lambda: later.state == "REVOKED", TIMEOUT_SECONDS, "it says REVOKED")
    never_runs(stack, victim, later)
    harness.wait_until(
        lambda: client.zrange(SCHEDULED, 0, -1) == [kept.id], TIMEOUT_SECONDS, "only the other one waits"
    )
    revoked: Any = stack.client.control.inspect([NODE], timeout=TIMEOUT_SECONDS).revoked()
    assert {*revoked[NODE]} == {victim.id, later.id}


def test_what_is_revoked_before_any_node_has_lived_never_runs_and_its_chord_errs(
    stack: Stack,
) -> None:
    ways: dict[str, Callable[[Any], object]] = {
        "control": lambda sent: client(stack, f"app.control.revoke([{sent.id!r}])"),
        "terminate": lambda sent: client(stack, f"app.control.terminate({sent.id!r}, signal='KILL')"),
        "result": lambda sent: client(stack, f"app.AsyncResult({sent.id!r}).revoke()"),
        "forgotten": lambda sent: client(stack, f"app.AsyncResult({sent.id!r}).revoke(terminate=True)"),
        "command": lambda sent: stack.celery(f"control revoke {sent.id}").exits(TIMEOUT_SECONDS),
        "terminate-command": lambda sent: stack.celery(f"control terminate KILL {sent.id}").exits(TIMEOUT_SECONDS),
        "stamp": lambda _: client(stack, "app.control.revoke_by_stamped_headers({'owner': ['stamp', 'x']})"),
        "stamp-result": lambda sent: client(
            stack, f"app.AsyncResult({sent.id!r}).revoke_by_stamped_headers({{'owner': 'stamp-result'}})"
        ),
        "group": lambda sent: client(stack, f"app.GroupResult('any', [app.AsyncResult({sent.id!r})]).revoke()"),
        "stamped": lambda _: stack.celery("control revoke_by_stamped_headers owner=stamped").exits(TIMEOUT_SECONDS),
    }
    sent = {way: stack.send("probe.mark", "victim", stamped_headers=["owner"], owner=way) for way in ways}
    kept = stack.send("probe.mark", "kept", stamped_headers=["owner"], owner="kept")
    parts = [stack.client.signature("probe.mark", args=[label]) for label in ("victim", "other")]
    body = chord(parts, app=stack.client)(stack.client.signature("probe.collect", args=["body"]))
    part = body.parent.results[0]
    for way, revoke_by in ways.items():
        revoke_by(sent[way])
    revoke(stack, part)

    start(stack)

    never_runs(stack, part, *sent.values())
    assert kept.get(timeout=TIMEOUT_SECONDS) == "kept"
    stack.harness.wait_until(lambda: body.state == "FAILURE", TIMEOUT_SECONDS, "the body of the chord fails")
    assert not stack.harness.started("body")


@pytest.mark.parametrize("prefetched", [1, 4])
def test_what_waits_behind_a_running_task_never_runs(stack: Stack, pool: str, prefetched: int) -> None:
    wait_listening(stack, start(stack, pool, more=f"--prefetch-multiplier={prefetched}"))
    running = stack.send("probe.end", "held", "retries")
    stack.harness.wait_started("held")
    victims = [stack.send("probe.mark", "victim"), stack.send("probe.mark", "victim", countdown=0.5)]
    revoke(stack, *victims, running)
    stack.harness.release("held")

    never_runs(stack, *victims)
    stack.harness.wait_until(lambda: running.state == "REVOKED", TIMEOUT_SECONDS, "it is not tried again")
    assert not stack.harness.started("held-again")


@pytest.mark.parametrize("how", ["id", "stamp", "alive"])
def test_what_a_node_hears_from_a_stock_client_outlives_it_and_is_one_event(stack: Stack, how: str) -> None:
    listener = wait_listening(stack, start(stack, queues="other", name="other"), "other")
    victim = stack.send("probe.mark", "victim", stamped_headers=["owner"], owner="somebody")
    control: Any = stack.client.control
    with events(stack) as received:
        command, what = control.revoke, victim.id
        if how == "stamp":
            command, what = control.revoke_by_stamped_headers, {"owner": "somebody"}
        answers = command(what, reply=True, timeout=TIMEOUT_SECONDS, limit=1)
        assert "flagged as revoked" in str(answers), answers
        if how != "alive":
            listener.process.end()

        # Nor does it ask the one that is alive.
        start(stack, more="--without-mingle --without-gossip" if how == "alive" else "")

        never_runs(stack, victim)
        stack.harness.wait_until(lambda: list_revoked(received), TIMEOUT_SECONDS, "the event of it")
        assert list_revoked(received) == [victim.id]


def list_revoked(received: list[dict[str, Any]]) -> list[str]:
    return [event["uuid"] for event in received if event["type"] == "task-revoked"]


def test_a_revoked_task_that_was_running_does_not_start_again_when_its_node_dies(stack: Stack, pool: str) -> None:
    first = wait_listening(stack, start(stack, pool))
    victim = hold(stack)
    revoke(stack, victim)
    first.process.end()

    start(stack, pool)

    stack.harness.wait_until(lambda: victim.state == "REVOKED", TIMEOUT_SECONDS, "it says REVOKED")
    never_runs(stack, victim)
    assert stack.harness.started("held") == 1


@pytest.mark.parametrize("cut", ["pubsub", "all", "none"])
def test_a_node_that_was_frozen_or_cut_off_when_it_was_told_knows_it(stack: Stack, pool: str, cut: str) -> None:
    one = wait_listening(stack, start(stack, pool))
    hold(stack)
    victim = stack.send("probe.mark", "victim")

    one.process.signal(signal.SIGSTOP)
    # redis-py connects again without a word when it is only the connection that listens.
    for kind in {"pubsub": ["pubsub"], "all": ["pubsub", "normal"], "none": []}[cut]:
        stack.redis.ask("CLIENT", "KILL", "TYPE", kind)
    revoke(stack, victim)
    one.process.signal(signal.SIGCONT)
    stack.harness.release("held")

    never_runs(stack, victim)


def test_one_of_two_nodes_that_was_cut_off_knows_it(stack: Stack) -> None:
    nodes = [wait_listening(stack, start(stack, name=name, queues=name), name) for name in ("one", "two")]
    # The one has no time to run it before it is revoked, the other cannot.
    hold(stack, queue="two")
    nodes[0].process.signal(signal.SIGSTOP)
    stack.redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
    sent = [stack.send("probe.mark", "victim", queue=name) for name in ("one", "two")]
    revoke(stack, *sent)
    nodes[0].process.signal(signal.SIGCONT)
    stack.harness.release("held")

    for name in ("one", "two"):
        stack.send("probe.mark", f"after-{name}", queue=name)
        stack.harness.wait_started(f"after-{name}")

    assert [one.state for one in sent] == ["REVOKED"] * 2
    assert not stack.harness.started("victim")


@pytest.fixture
def raw(stack: Stack) -> redis.Redis:
    return redis.Redis(port=stack.redis.port, password=stack.redis.password)


def test_what_has_been_kept_for_long_enough_is_forgotten(
    stack: Stack, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "KEEP_SECONDS", 1)
    sent = stack.send("probe.mark", "old")
    revocations.store(raw, REVOKED_TASKS, [sent.id])
    wait_until(lambda: not raw.exists(REVOKED_TASKS), TIMEOUT_SECONDS, "the last one of them is forgotten")

    start(stack)

    assert sent.get(timeout=TIMEOUT_SECONDS) == "old"


def test_what_is_forgotten_is_neither_read_nor_kept_beside_what_is_new(raw: redis.Redis) -> None:
    raw.zadd(REVOKED_TASKS, {"old": time() - 1})
    raw.zadd(REVOKED_STAMPS, {'["owner", "old"]': time() - 1})
    assert revocations.load(raw) == revocations.Revocations({}, {})

    revocations.store_command(raw, "revoke", {"task_id": "new"})
    revocations.store_command(raw, "revoke_by_stamped_headers", {"headers": ["owner=a=b", "count=1"]})

    found = revocations.load(raw)
    assert list(found.ids) == ["new"]
    assert set(found.stamps) == {'["owner", "a=b"]', '["count", "1"]'}
    for left in (*found.ids.values(), *found.stamps.values()):
        assert revocations.KEEP_SECONDS - TIMEOUT_SECONDS < left <= revocations.KEEP_SECONDS
    for key, members in ((REVOKED_TASKS, 1), (REVOKED_STAMPS, 2)):
        assert raw.zcard(key) == members
        assert 0 < raw.ttl(key) <= revocations.KEEP_SECONDS


def test_no_more_are_kept_than_a_node_has_room_for_whatever_json_can_spell(
    raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "MAX_KEPT", 4)
    revocations.store(raw, REVOKED_TASKS, ["first"])
    revocations.store(raw, REVOKED_TASKS, ["a b", "\ud800", "ü"])
    revocations.store(raw, REVOKED_TASKS, [""])

    assert set(revocations.load(raw).ids) == {"a b", "\ud800", "ü", ""}


def test_celerys_book_of_stamps_holds_what_a_bounded_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "_stamps", LimitedSet(maxlen=2))
    monkeypatch.setattr(worker_state, "revoked_stamps", {})
    headers = {"owner": ["a", "b"], "count": 1}

    for _ in range(3):
        revocations.remember_stamps(revocations.format_stamps(headers))

    assert worker_state.revoked_stamps == {"owner": ["b"], "count": [1]}


def test_no_task_asks_redis_what_is_revoked(stack: Stack, raw: Any, pool: str) -> None:
    wait_listening(stack, start(stack, pool))
    stack.send("probe.mark", "before")
    stack.harness.wait_started("before")
    with raw.monitor() as monitor:
        for number in range(20):
            stack.send("probe.mark", f"one-{number}")
        stack.send("probe.mark", "last").get(timeout=TIMEOUT_SECONDS)
        stack.redis.ask("ECHO", "the end")
        commands = []
        while "ECHO the end" not in commands:
            commands.append(monitor.next_command()["command"])

    assert sum("probe.mark" in command for command in commands) > 20, commands
    assert not [command for command in commands if REVOKED_TASKS in command or REVOKED_STAMPS in command]


def test_a_full_redis_keeps_what_is_revoked(stack: Stack) -> None:
    victim = stack.send("probe.mark", "victim")
    stack.redis.fill(2)

    assert not client(stack, f"app.control.revoke({victim.id!r})")

    stack.redis.make_room()
    start(stack)
    never_runs(stack, victim)


def test_a_node_on_a_full_redis_revokes_what_it_hears(stack: Stack, raw: redis.Redis, pool: str) -> None:
    wait_listening(stack, start(stack, pool))
    hold(stack)
    victim = stack.send("probe.mark", "victim")
    stack.redis.fill(2)

    stack.client.control.revoke(victim.id)

    if pool != "solo":
        # The others hear it while a task runs.
        stack.harness.wait_until(lambda: revocations.load(raw).ids, TIMEOUT_SECONDS, "it is kept")
    stack.redis.make_room()
    stack.harness.release("held")
    never_runs(stack, victim)


def test_nodes_and_clients_that_may_not_keep_what_is_revoked_say_so_and_work(stack: Stack) -> None:
    allowed = ("celery*", "*.celery.pidbox*", "_kombu*", "unacked*", "sweeps", "scheduled*", "dead*", "published*")
    stack.redis.ask("ACL", "SETUSER", "default", "resetkeys", *(f"~{pattern}" for pattern in allowed))

    one = wait_listening(stack, start(stack))

    one.says("ERROR .*What was revoked before cannot be read from Redis, and may run here: .*permission")
    warning = "revoke is not kept in Redis: only nodes that hear it now know of it: "
    assert warning in client(stack, "app.control.revoke('any')")
    [answer] = stack.client.control.revoke("victim", reply=True, timeout=TIMEOUT_SECONDS, limit=1)
    assert "flagged as revoked, but in this node only, and not kept in Redis: " in answer[NODE]["ok"]
    one.says("WARNING .*Revoked in this node only, and not kept in Redis: .*permission", times=2)
    never_runs(stack, stack.send("probe.mark", "victim", task_id="victim"))


def test_a_command_that_cannot_be_sent_fails(stack: Stack) -> None:
    wrong = stack.celery("control revoke_by_stamped_headers owner")
    assert wrong.exits(TIMEOUT_SECONDS) != 0
    wrong.says("a stamped header is written name=value, not 'owner'")

    stack.redis.stop()

    command = stack.celery("control revoke any")
    assert command.exits(TIMEOUT_SECONDS) != 0
    command.says("Could not connect to the message broker")
