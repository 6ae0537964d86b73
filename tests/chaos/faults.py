"""The faults: each a named operation that strikes once and asserts that it did."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from celery import Celery
from redis.exceptions import OutOfMemoryError

from tests.chaos.arena import GO_ON_SECONDS, NODES, POISON, STOCK_SECONDS, Arena, Order, UnackedDeliveries, state
from tests.chaos.census import TASK_ID
from tests.chaos.marks import CUT_OFF, DIED, FORGOT, Incident, Mark
from tests.chaos.subjects import CONCURRENCY, REPLIES, SOFT_SHUTDOWN, STALK, STOCK, Subject
from tests.chaos.tasks import note
from tests.support.checkout import ROOT
from tests.support.redis.builds import write_check_aof
from tests.support.redis.proxy import Proxy
from tests.support.redis.server import executable
from tests.support.waiting import GaveUp
from tests.support.world import READY_SECONDS

# Of the lease: safely longer, and shorter even for what was renewed a third of it ago.
LONGER, SHORTER = 1.5, 0.5
# Redis is away: longer than any client repeats a command for, so that connections fail and come back.
OUTAGE_SECONDS = 1.5
# Redis refuses writes for a while.
FULL_SECONDS = 2.0
# What Redis is full of, a megabyte and a half. They are due when all are there, and most of them have to end before it
# uses less again than it may.
FULL_TASKS, FULL_DUE_SECONDS, FULL_TIMES = 1000, 8.0, 1.06
# After this long a client that hears nothing gives its connection up (config/celery.py, and stock_app.py).
SOCKET_TIMEOUT = 10
# Of a strike in which no stock node was waiting for the message.
NOBODY_WAITED = "no stock node was waiting for a message"
# Cut off the end of the append-only file: a part of its last command.
TORN_BYTES = 50
# WORKER_MAX_DELIVERIES, and the signals that the poison tasks send themselves.
DELIVERIES = 5
POISONS = {"poison-kill": signal.SIGKILL, "poison-segv": signal.SIGSEGV}
# Between the last starts of tasks that have died together (services/broker/lua/sweep.lua).
TURN_SECONDS = 10
# A task that is still running when a node has taken notice of TERM, and is killed: shorter than the soft shutdown.
SLOW_SECONDS = 4.0
# What a node says when it has taken notice.
SHUTDOWN = "[Ss]hutdown"
# A process that was killed is gone within milliseconds, on a busy machine later.
GONE_SECONDS = 60
# The name of a chord, in the id of a task in its header.
CHORD_PART = re.compile(rb"(chaos-\w+-\d{6})-\d\d")


@dataclass(frozen=True)
class Fault:
    """An operation, and the run that it needs."""

    name: str
    strike: Callable[[Arena], None]
    # How often in the short form, and in the full one.
    times: tuple[int, int]
    # What keeps coming while it strikes: tasks, chords, or nothing.
    load: str
    # How long each task takes.
    seconds: float
    proxied: bool
    # Of kombu's transport there is nothing to be said.
    stalk_only: bool

    @property
    def about(self) -> str:
        """What it does, in a line."""
        return str(self.strike.__doc__).partition("\n")[0].rstrip(".")


FAULTS: dict[str, Fault] = {}


def fault(
    short: int = 1,
    full: int = 1,
    *,
    load: str = "tasks",
    seconds: float = 0.01,
    proxied: bool = False,
    stalk_only: bool = False,
) -> Callable[[Callable[[Arena], None]], Callable[[Arena], None]]:
    """Put a function among the faults; it strikes `short` or `full` times in a run."""

    def add(strike: Callable[[Arena], None]) -> Callable[[Arena], None]:
        name = strike.__name__
        FAULTS[name] = Fault(name, strike, (short, full), load, seconds, proxied, stalk_only)
        return strike

    return add


# Workers.


@fault(3, 100)
def sigkill_node(arena: Arena) -> None:
    """SIGKILL of a node under load."""
    arena.kill(arena.busy_node())
    arena.replace()


@fault(3, 20)
def sigkill_child(arena: Arena) -> None:
    """SIGKILL of a pool child; where there are none, of the node."""
    if arena.plan.pool != "prefork":
        sigkill_node(arena)
        return
    child = arena.some_child()
    since, seen = monotonic(), arena.seen()
    os.kill(child, signal.SIGKILL)
    arena.incidents.append(Incident(DIED, since, monotonic(), pid=child, seen=seen))
    arena.wait(lambda: state(child) == "Z", GONE_SECONDS, "the child is gone")


@fault(1, 5)
def freeze_node(arena: Arena) -> None:
    """A node frozen for longer than its lease, then let go on."""
    frozen(arena, arena.plan.lease * LONGER)


@fault(1, 5)
def freeze_node_briefly(arena: Arena) -> None:
    """A node frozen for half a lease."""
    frozen(arena, arena.plan.lease * SHORTER)


def frozen(arena: Arena, seconds: float) -> None:
    deliveries = arena.busy_node()
    arena.freeze(deliveries)
    arena.pass_time(seconds)
    assert state(deliveries.node.process.pid) == "T", f"{deliveries.name} did not stay frozen"
    arena.thaw(deliveries)


@fault(2, 10, seconds=0.05)
def term_node(arena: Arena) -> None:
    """TERM of a node under load."""
    stop(arena, arena.busy_node())
    arena.replace()


def stop(arena: Arena, deliveries: UnackedDeliveries) -> None:
    deliveries.leaving = True
    deliveries.node.process.terminate()
    seconds = STOCK_SECONDS if deliveries.subject == STOCK else SOFT_SHUTDOWN + GO_ON_SECONDS
    try:
        arena.wait(lambda: not deliveries.alive, seconds, f"{deliveries.name} leaves")
    except GaveUp:
        if deliveries.subject != STOCK:
            raise
        # Celery's prefork pool sometimes waits for ever in its warm shutdown. Docker and Supervisor kill it then.
        arena.remarks.append(f"{deliveries.name} did not leave")
        arena.kill(deliveries)
        return
    assert deliveries.node.process.code == 0, deliveries.node.process.tail()


@fault(1, 5)
def term_node_then_kill(arena: Arena) -> None:
    """TERM of a node in the middle of a task, and KILL before it has ended."""
    label = arena.new_label("slow")
    arena.send(Order(label, argument=SLOW_SECONDS))
    started = partial(running, arena, label)
    (deliveries,) = arena.wait(started, arena.plan.lease + GO_ON_SECONDS, "the slow task runs")
    if arena.plan.subject == STALK:
        arena.wait(partial(is_told, arena, label), GO_ON_SECONDS, "Redis knows that the slow task has started")
    deliveries.leaving = True
    deliveries.node.process.terminate()
    noticed = partial(deliveries.node.process.count, SHUTDOWN)
    arena.wait(noticed, GO_ON_SECONDS, f"{deliveries.name} takes notice of TERM")
    assert deliveries.alive, f"{deliveries.name} has left before it was killed"
    arena.kill(deliveries)
    arena.replace()


def running(arena: Arena, label: str) -> list[UnackedDeliveries]:
    """The node that runs the task with this label."""
    names = {mark.node for mark in arena.marks.running() if mark.task.startswith(f"chaos-{label}-")}
    return [deliveries for deliveries in arena.alive() if deliveries.name in names][:1]


def is_told(arena: Arena, label: str) -> bool:
    """Whether Redis knows that the task with this label has started."""
    return any(task.startswith(f"chaos-{label}-") for task in arena.seen().told)


@fault()
def poison(arena: Arena) -> None:
    """Tasks that kill the process which runs them, by SIGKILL and by SIGSEGV."""
    for label, number in POISONS.items():
        arena.send(Order(label, task=POISON, argument=number))
    # Each delivery needs a lease to run out, a sweep after a lease of rest, and a node that starts; for the last two,
    # what both nodes have run takes turns.
    turns = 2 * NODES * CONCURRENCY[arena.plan.pool] * TURN_SECONDS
    seconds = DELIVERIES * (arena.plan.lease * 2 + arena.patience) + turns
    if arena.plan.subject == STALK:
        arena.wait(lambda: arena.parked() >= len(POISONS), seconds, "the poison is parked")
    else:
        with suppress(GaveUp):
            arena.wait(lambda: min(starts(arena.marks.all()).values()) > DELIVERIES, seconds, "the poison goes on")
    for label, count in starts(arena.marks.all()).items():
        assert count, f"{label} has never started"
        arena.remarks.append(f"{label} started {count} times")


def starts(marks: list[Mark]) -> dict[str, int]:
    """How often each poison has started."""
    found = [mark.task for mark in marks if mark.word == "start"]
    return {label: sum(1 for task in found if task.startswith(f"chaos-{label}")) for label in POISONS}


@fault(1, 5, stalk_only=True)
def mixed_workers(arena: Arena) -> None:
    """Stock and Stalk workers on the same queue; one of Stalk is killed, a stock one told to go, and one killed."""
    arena.kill(one_of(arena, STALK))
    arena.start_node(STALK).node.ready()
    stop(arena, one_of(arena, STOCK))
    arena.start_node(STOCK).node.ready()
    arena.go_on()
    arena.kill(one_of(arena, STOCK))
    arena.start_node(STOCK).node.ready()


def one_of(arena: Arena, subject: Subject) -> UnackedDeliveries:
    """A node of this kind."""
    return arena.random.choice([each for each in arena.alive() if each.subject == subject])


# Tasks.


@fault()
def long_task(arena: Arena) -> None:
    """Tasks twice as long as the lease."""
    # Half of the slots: the others go on with the load.
    label, count, seconds = arena.new_label("long"), CONCURRENCY[arena.plan.pool], arena.plan.lease * 2
    arena.send(Order(label, argument=seconds, count=count))
    ended(arena, label, count, seconds * 2)


@fault()
def long_eta(arena: Arena) -> None:
    """Tasks with an ETA two leases ahead."""
    label, count, seconds = arena.new_label("eta"), 20, arena.plan.lease * 2
    arena.send(Order(label, count=count, countdown=seconds))
    ended(arena, label, count, seconds)


def ended(arena: Arena, label: str, count: int, seconds: float) -> None:
    """Wait for tasks to end; those that do not will be missed when all are counted."""

    def enough() -> bool:
        return sum(1 for task in arena.marks.tasks("end") if task.startswith(f"chaos-{label}-")) >= count

    with suppress(GaveUp):
        arena.wait(enough, seconds + arena.patience, f"{label} has ended")


@fault(2, 20, load="chords")
def chord_under_kills(arena: Arena) -> None:
    """SIGKILL of a node that works on chords."""
    sigkill_node(arena)


@fault()
def restart_of_everything(arena: Arena) -> None:
    """Redis and all nodes killed while tasks wait for a far ETA."""
    # Later than the last node is back, however busy the machine is.
    count, seconds = 50, max(arena.plan.lease * 3, 20)
    arena.send(Order("far", count=count, countdown=seconds))
    arena.go_on()
    for deliveries in arena.alive():
        arena.kill(deliveries)
    arena.redis.kill()
    arena.redis.start()
    arena.replace()
    ended(arena, "far", count, seconds)


# Connections.


@fault(3, 20, proxied=True)
def cut_connections(arena: Arena) -> None:
    """Every connection to Redis cut."""
    assert proxy(arena).cut() > 0


@fault(1, 3, proxied=True)
def half_open_connections(arena: Arena) -> None:
    """Every connection half open: what is sent is swallowed, nobody is told."""
    now, seen = monotonic(), arena.seen()
    assert proxy(arena).half_open() > 0
    if arena.plan.lease <= SOCKET_TIMEOUT:
        # Nobody can renew in time who waits so long for an answer.
        arena.incidents.append(Incident(CUT_OFF, now, monotonic() + SOCKET_TIMEOUT + arena.plan.lease, seen=seen))


@fault(3, 20, proxied=True)
def drop_claim_reply(arena: Arena) -> None:
    """The reply that brings a worker its task is dropped with its connection."""
    drop(arena, "claim")


@fault(3, 20, proxied=True)
def drop_ack_reply(arena: Arena) -> None:
    """The reply to an acknowledgement is dropped with its connection."""
    drop(arena, "ack")


@fault(3, 20, proxied=True)
def drop_publish_reply(arena: Arena) -> None:
    """The reply to a publish is dropped with its connection."""
    drop(arena, "publish")


@fault(3, 20, proxied=True)
def drop_result_reply(arena: Arena) -> None:
    """The reply to a result that is stored is dropped with its connection."""
    drop(arena, "result")


def drop(arena: Arena, name: str) -> None:
    trap = proxy(arena).drop_reply(REPLIES[name])
    try:
        arena.wait(trap.dropped.is_set, arena.plan.lease + GO_ON_SECONDS, f"a reply to {name} is dropped")
    finally:
        proxy(arena).disarm()


def proxy(arena: Arena) -> Proxy:
    assert arena.proxy, "this fault needs a proxy"
    return arena.proxy


@fault(3, 20, load="")
def kill_clients_with_publish(arena: Arena) -> None:
    """CLIENT KILL of every worker's connections in the same packet as a publish."""
    answers = in_one_packet(arena, ["CLIENT", "KILL", "SKIPME", "yes"])
    assert int(answers[-1][1:]) > 0, answers


# Redis.


@fault(2, 10)
def redis_kill(arena: Arena) -> None:
    """Redis killed with -9 and started again on its append-only file."""
    arena.redis.kill()
    assert arena.redis.process.code == -signal.SIGKILL
    arena.pass_time(OUTAGE_SECONDS)
    arena.redis.start()


@fault(2, 10)
def redis_restart(arena: Arena) -> None:
    """Redis restarted in order."""
    arena.redis.stop()
    assert arena.redis.process.code == 0
    arena.pass_time(OUTAGE_SECONDS)
    arena.redis.start()


@fault(1, 3)
def redis_freeze(arena: Arena) -> None:
    """Redis frozen for longer than a lease."""
    arena.redis.freeze()
    arena.pass_time(arena.plan.lease * LONGER)
    assert state(arena.redis.process.pid) == "T"
    arena.redis.thaw()


@fault(2, 10)
def redis_full(arena: Arena) -> None:
    """Redis full for a while: it refuses every write.

    And then full of tasks, which have to empty it. Stock workers could not.
    """
    arena.redis.ask("CONFIG", "SET", "maxmemory", "1")
    is_full(arena)
    arena.pass_time(FULL_SECONDS)
    arena.redis.make_room()
    if arena.plan.subject == STALK:
        empty_itself(arena)


def is_full(arena: Arena) -> None:
    assert not takes_writes(arena), "Redis is not full"


def empty_itself(arena: Arena) -> None:
    """Fill Redis with tasks that are soon due; nobody makes room but those that run them."""
    label = arena.new_label("full")
    arena.send(Order(label, count=FULL_TASKS, countdown=FULL_DUE_SECONDS))
    arena.wait(partial(all_are, arena, "sent", label), GO_ON_SECONDS, f"{label} is sent")
    arena.redis.fill(FULL_TIMES)
    is_full(arena)
    arena.wait(partial(all_are, arena, "end", label), FULL_DUE_SECONDS + arena.patience, f"{label} has emptied Redis")
    # What has ended is acknowledged a moment later.
    arena.wait(partial(takes_writes, arena), GO_ON_SECONDS, f"Redis takes writes again, which {label} had filled")
    arena.redis.make_room()


def takes_writes(arena: Arena) -> bool:
    """Whether Redis uses less than it may."""
    with suppress(OutOfMemoryError):
        return bool(arena.redis.client().set("chaos-probe", "1"))
    return False


def all_are(arena: Arena, word: str, label: str) -> bool:
    """Whether there is such a mark of every task that fills Redis."""
    return sum(1 for task in arena.marks.tasks(word) if task.startswith(f"chaos-{label}-")) >= FULL_TASKS


@fault(3, 10, load="")
def redis_full_at_pop(arena: Arena) -> None:
    """Redis full in the same packet as a publish: between a worker's pop and its next write."""
    in_one_packet(arena, ["CONFIG", "SET", "maxmemory", "1"])
    arena.pass_time(FULL_SECONDS)
    arena.redis.make_room()


@fault(10, 100)
def script_flush(arena: Arena) -> None:
    """SCRIPT FLUSH under load."""
    assert arena.redis.ask("SCRIPT", "FLUSH") == "OK"


@fault(1, 5)
def torn_append_only_file(arena: Arena) -> None:
    """Redis killed and its append-only file torn: the last 50 bytes are missing."""
    since = monotonic()
    arena.redis.kill()
    path = newest_increment(arena.redis.directory)
    before = path.read_bytes()
    others = b"".join(each.read_bytes() for each in path.parent.iterdir() if each.is_file() and each != path)
    os.truncate(path, len(before) - TORN_BYTES)
    repair(arena.redis.directory)
    repaired = path.stat().st_size
    said = arena.redis.process.log()
    arena.redis.start()
    kept = truncated_at(arena.redis.process.log().removeprefix(said), before, repaired)
    assert 0 < kept < len(before), f"{path.name} had {len(before)} bytes, and Redis kept {kept}"
    gone = set(TASK_ID.findall(before)) - set(TASK_ID.findall(before[:kept])) - set(TASK_ID.findall(others))
    # What a chord counts is written once as well: without it, its body is never sent.
    bodies = {part + b"-body" for part in CHORD_PART.findall(before[kept:])}
    arena.never_kept.update(task.decode() for task in gone | bodies)
    # Who holds what Redis has forgotten hears so when he renews.
    arena.incidents.append(Incident(FORGOT, since, monotonic() + arena.plan.lease))
    arena.remarks.append(f"{len(before) - kept} bytes gone, the first trace of {len(gone)} tasks among them")


def repair(directory: Path) -> None:
    """Do with the append-only file what the stack's own start of Redis does."""
    tool = directory / "redis-check-aof"
    tool.unlink(missing_ok=True)
    write_check_aof(Path(executable()), tool)
    script = ROOT / "docker" / "redis" / "repair"
    environment = {**os.environ, "STALK_REDIS_CHECK_AOF": str(tool)}
    subprocess.run(["sh", str(script), str(directory)], env=environment, check=True, capture_output=True)


def newest_increment(directory: Path) -> Path:
    """The append-only file that Redis writes to; before version 7 there is but one."""
    increments = (directory / "appendonlydir").glob("*.incr.aof")
    return max(increments, key=lambda path: path.stat().st_mtime, default=directory / "appendonly.aof")


def truncated_at(log: str, before: bytes, end: int) -> int:
    """Where Redis says that it has cut the file off, or where it was torn between two commands and says nothing."""
    if found := re.findall(r"Truncating the AOF .*at offset (\d+)", log):
        return int(found[-1])
    assert re.match(rb"\r\n\*\d+\r\n", before[end - 2 :]), f"Redis does not say that it has cut a file off:\n{log}"
    return end


# A message as a plain producer writes it, and a command behind it that no worker gets in between.


def in_one_packet(arena: Arena, command: list[str]) -> list[bytes]:
    """Publish a task and send a command in one packet, while the workers wait; Redis's answers."""
    wait_idle(arena)
    name = f"chaos-packet-{arena.marks.count('sent'):06d}"
    message = plain_message(arena, name)
    with socket.create_connection(("127.0.0.1", arena.redis.port), GO_ON_SECONDS) as connection:
        reader = connection.makefile("rb")
        connection.sendall(encoded("AUTH", arena.redis.password))
        assert reader.readline() == b"+OK\r\n"
        connection.sendall(encoded("LPUSH", "celery", message) + encoded("LLEN", "celery") + encoded(*command))
        answers = [reader.readline() for _ in range(3)]
    assert answers[0].startswith(b":"), answers
    if arena.plan.subject == STOCK and answers[1] != b":0\r\n":
        arena.remarks.append(NOBODY_WAITED)
    os.environ["CHAOS_MARKS"] = str(arena.marks.directory)
    note("sent", name)
    return answers


def encoded(*words: str) -> bytes:
    """A command as it is on the wire."""
    parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


def plain_message(arena: Arena, name: str) -> str:
    """A task's message, sent to another queue by plain Celery, and readdressed."""
    with Celery("plain", broker=arena.redis.url(), set_as_current=False) as app:
        app.send_task("chaos.work", (0.01,), task_id=name, queue="spare")
    fields = json.loads(str(arena.redis.client().rpop("spare")))
    fields["properties"]["delivery_info"]["routing_key"] = "celery"
    return json.dumps(fields)


def wait_idle(arena: Arena) -> None:
    """Wait until no node has anything to do; stock ones wait in a blocking command then, which can be seen."""
    done = partial(all_ended, arena)
    with suppress(GaveUp):
        arena.wait(done, arena.plan.lease, "what was sent has ended")
    if arena.plan.subject == STOCK:
        with suppress(GaveUp):
            arena.wait(lambda: blocked(arena) >= NODES, READY_SECONDS / 4, "every node waits")


def all_ended(arena: Arena) -> bool:
    return arena.marks.tasks("sent") <= arena.marks.tasks("end")


def blocked(arena: Arena) -> int:
    """Connections that wait in a blocking command."""
    return sum(1 for client in arena.redis.client().client_list() if "b" in client["flags"])
