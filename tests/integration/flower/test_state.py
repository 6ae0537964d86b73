"""What Flower keeps of tasks and workers, over a kill and within its limits."""

import os
import pickle
import select
import signal
import threading
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from services.flower.events import MAX_WAITING_EVENTS, Events
from tests.integration.flower.conftest import Serve
from tests.support.harness import Harness
from tests.support.redis.server import RedisServer
from tests.support.served_flower import TIMEOUT, ServedFlower, run_task, send_events, send_sent_event, start_worker


def kill_while_saving(served: ServedFlower, broker: str) -> None:
    """Kill Flower in the middle of a save, and leave the part that it has written in place."""
    partial = served.database.with_name("flower.db.new")

    def hold() -> bool:
        with suppress(FileExistsError):
            # A process that writes to a pipe blocks once the pipe is full.
            os.mkfifo(partial)
        return partial.is_fifo()

    served.until(hold, TIMEOUT, "there is a pipe in place of the file that it writes")
    with open(os.open(partial, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        send_events(broker)
        assert select.select([pipe], [], [], TIMEOUT)[0], served.process.tail()
        served.process.signal(signal.SIGKILL)
        assert served.process.wait(TIMEOUT) == -signal.SIGKILL
        written = pipe.read()
    partial.unlink()
    partial.write_bytes(written)


def test_a_kill_while_flower_saves_loses_nothing_that_was_saved(
    own_redis: RedisServer, harness: Harness, serve: Serve
) -> None:
    served = serve(own_redis).ready()
    start_worker(harness, own_redis.url(), "maker@shop")
    uuid = run_task(own_redis.url())
    served.until(lambda: served.tasks().get(uuid, {}).get("worker"), TIMEOUT, "its worker is known")
    # Events are saved in order: with a later event, all earlier ones are saved.
    later = send_events(own_redis.url(), 1000)[0]
    served.wait_for_task(later)
    served.wait_for_save(later)
    kill_while_saving(served, own_redis.url())
    again = serve(own_redis).ready()
    assert later in again.tasks()
    assert again.tasks()[uuid]["worker"] == "maker@shop"
    # A task with a parent that was read back can be rendered and saved again.
    assert again.ask(f"/task/{uuid}").status == 200
    again.wait_for_save(send_events(own_redis.url())[0])
    assert uuid.encode() in again.database.read_bytes()
    assert again.database.stat().st_mode & 0o077 == 0
    for noise in ("cannot be read", "Traceback"):
        assert noise not in again.process.log()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps({"events": 1}), pickle.dumps(("x" * 999, {}))[:500]],
    ids=["empty", "garbage", "something-else", "torn"],
)
def test_an_unreadable_file_is_moved_aside(content: bytes, redis: RedisServer, harness: Harness, serve: Serve) -> None:
    directory = harness.directory / "flower"
    directory.mkdir()
    (directory / "flower.db").write_bytes(content)
    served = serve(redis).ready()
    assert served.tasks() == {}
    assert (directory / "flower.db.unreadable").read_bytes() == content
    assert served.process.count("cannot be read") == 1
    assert "Traceback" not in served.process.log()


def test_a_database_that_cannot_be_written_is_said_at_once(harness: Harness, serve: Serve) -> None:
    (harness.directory / "flower" / "flower.db.new").mkdir(parents=True)
    served = serve(None)
    error = served.refused()
    assert error.startswith(f"{served.database}: Flower cannot write there (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["redis-there", "redis-frozen"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_flower_stops_and_saves(number: signal.Signals, frozen: bool, own_redis: RedisServer, serve: Serve) -> None:
    served = serve(own_redis, FLOWER_STATE_SAVE_INTERVAL="3600").ready()
    uuid = send_events(own_redis.url())[0]
    served.wait_for_task(uuid)
    assert not served.database.exists()
    if frozen:
        own_redis.freeze()
        served.until(lambda: served.health() == 503, TIMEOUT, "the health check says that Redis is away")
    served.process.signal(number)
    assert served.process.wait(TIMEOUT) == 0
    assert uuid.encode() in served.database.read_bytes()
    for noise in ("Traceback", "Task was destroyed", "never awaited"):
        assert noise not in served.process.log()


def test_limits_hold_for_new_tasks_and_for_those_read_back(own_redis: RedisServer, serve: Serve) -> None:
    served = serve(own_redis, FLOWER_MAX_TASKS="200").ready()
    last = ""
    for index in range(3):
        last = send_events(own_redis.url(), 100, f"ghost{index}@shop")[-1]
        served.wait_for_task(last)
    assert len(served.tasks()) == 200
    assert len(served.ask("/api/workers?status=1").json) == 3
    served.process.terminate()
    assert served.process.wait(TIMEOUT) == 0
    fewer = serve(own_redis, FLOWER_MAX_TASKS="100", FLOWER_MAX_WORKERS="2").ready()
    assert len(fewer.tasks()) == 100
    assert last in fewer.tasks()
    assert fewer.ask("/api/workers?status=1").json.keys() == {"ghost1@shop", "ghost2@shop"}


def test_events_that_flower_cannot_follow_are_left_to_redis() -> None:
    # The calls of an event loop that makes none of them.
    calls: list[Any] = []
    loop = SimpleNamespace(add_callback=lambda *call: calls.append(call))
    events = Events(Celery("t", set_as_current=False), loop)
    event = {"type": "worker-heartbeat", "hostname": "w@h", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
    full = threading.Event()

    def receive() -> None:
        for _ in range(MAX_WAITING_EVENTS):
            events.on_event(event)
        full.set()
        events.on_event(event)

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    assert full.wait(TIMEOUT)
    assert len(calls) == MAX_WAITING_EVENTS
    take, argument = calls[0]
    # It is blocked until an event is handled.
    assert receiver.is_alive()
    take(argument)
    receiver.join(TIMEOUT)
    assert not receiver.is_alive()


def test_a_worker_and_a_sender_that_are_gone_disappear_everywhere(
    own_redis: RedisServer, harness: Harness, serve: Serve
) -> None:
    served = serve(own_redis, FLOWER_PURGE_OFFLINE_WORKERS="3").ready()
    killed = start_worker(harness, own_redis.url(), "killed@shop")
    run_task(own_redis.url())
    places = ["/workers?json=1", "/workers", "/metrics", "/api/workers", "/api/workers?status=1"]
    sent = count(1)

    def shown_on() -> list[str]:
        return [place for place in places if "killed@shop" in served.ask(place).text]

    def counted() -> bool:
        # Send at each try: a busy machine may look only after it has been forgotten.
        send_sent_event(own_redis.url(), "gen7@laptop")
        next(sent)
        return "gen7@laptop" in served.ask("/metrics").text

    served.until(lambda: shown_on() == places, TIMEOUT, "the worker is shown everywhere")
    killed.signal(signal.SIGKILL)
    served.until(lambda: not shown_on(), TIMEOUT, "the worker is shown nowhere")
    # Each process has its own counters, and each call of a command line tool is a new process.
    served.until(counted, TIMEOUT, "the sender is counted")
    served.until(lambda: "gen7@laptop" not in served.ask("/metrics").text, TIMEOUT, "the sender is forgotten")
    # Its tasks are not, nor are the two that the worker has run.
    assert len(served.tasks()) == next(sent) - 1 + 2
