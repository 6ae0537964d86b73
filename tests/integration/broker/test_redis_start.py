"""docker/redis/start, without a container around it, on what a killed Redis or a crash of the machine has left."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.checkout import ROOT
from tests.support.harness import PASSWORD, Harness
from tests.support.processes import Process
from tests.support.redis.builds import write_check_aof
from tests.support.redis.server import ANSWER_SECONDS, START_SECONDS, STOP_SECONDS, executable
from tests.support.waiting import wait_until

pytestmark = pytest.mark.each_redis

# An answer takes 20 ms, and hundreds are waited for.
LOOK_SECONDS = 0.005
State = dict[str, Any]


def client_transaction(client: redis.Redis) -> None:
    transaction = client.pipeline()
    transaction.lpush("queue", "a")
    transaction.incr("sent")
    transaction.execute()


# What Redis writes as a transaction, a script's among it, and what it does not.
WRITES: tuple[Callable[[redis.Redis], object], ...] = (
    client_transaction,
    lambda client: client.eval("redis.call('HSET', 'held', 'b', '\\r\\nEXEC\\r\\n') redis.call('INCR', 'sent')", 0),
    lambda client: client.incr("sent"),
    lambda client: client.eval("redis.call('LPUSH', 'queue', 'c') redis.call('HDEL', 'held', 'b')", 0),
)


class Started:
    """Redis as the stack starts it, on a directory of its own."""

    def __init__(self, harness: Harness) -> None:
        self.harness, self.data = harness, harness.path("data")
        self.data.mkdir()
        self.tool = harness.path("tools") / "redis-check-aof"
        self.tool.parent.mkdir()
        write_check_aof(Path(executable()), self.tool)
        self.socket = self.data / "redis.sock"
        self.login = {"REDIS_PASSWORD": PASSWORD}
        # It asks once: it is the test that waits.
        self.client = redis.Redis(
            unix_socket_path=str(self.socket),
            password=PASSWORD,
            decode_responses=True,
            socket_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self.process: Process

    def launch(self) -> Process:
        """Start the script, whatever comes of it."""
        settings = {
            "PATH": os.environ["PATH"],
            **self.login,
            "STALK_REDIS_SERVER": executable(),
            "STALK_REDIS_CHECK_AOF": str(self.tool),
            "STALK_REDIS_DIR": str(self.data),
            "STALK_REDIS_SOCKET": str(self.socket),
        }
        self.process = self.harness.process("start", ["sh", str(ROOT / "docker" / "redis" / "start")], settings)
        return self.process

    def start(self) -> redis.Redis:
        """Start Redis; a client of it."""
        self.launch()
        return self.connect()

    def connect(self) -> redis.Redis:
        """The client, once the Redis that the start becomes answers."""

        def answers() -> bool:
            assert self.process.alive, self.process.tail()
            try:
                return bool(self.client.ping())
            except redis.RedisError:
                return False

        wait_until(answers, START_SECONDS, "Redis answers", self.process.tail, LOOK_SECONDS)
        return self.client

    def ends(self) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.process.signal(signal.SIGKILL)
        self.ends()

    def stop(self) -> None:
        """An orderly end, without the tenth of a second in which Redis sees a signal."""
        self.client.shutdown()
        assert self.ends() == 0

    @property
    def file(self) -> Path:
        """The append-only file that Redis writes to; before version 7 there is but one."""
        parts = (self.data / "appendonlydir").glob("*.incr.aof")
        return max(parts, key=lambda path: int(path.name.split(".")[2]), default=self.data / "appendonly.aof")

    def kill_after_writes(self) -> list[tuple[int, State]]:
        """Write with each of WRITES to a file that was rewritten, and kill it: how long it was with which state."""
        client = self.start()
        client.config_set("appendfsync", "always")
        client.set("sent", 0)
        client.bgrewriteaof()

        def rewritten() -> bool:
            now = client.info("persistence")
            return not (now["aof_rewrite_in_progress"] or now["aof_rewrite_scheduled"])

        wait_until(rewritten, ANSWER_SECONDS, "the file has been written anew", self.process.tail)
        # Since version 7 a file of its own, which is empty until then.
        client.incr("sent")
        states = []
        for write in (lambda _: None, *WRITES):
            write(client)
            states.append((self.file.stat().st_size, state(client)))
        self.kill()
        return states


def state(client: redis.Redis) -> State:
    """All that is in Redis."""
    return {"sent": client.get("sent"), "queue": client.lrange("queue", 0, -1), "held": client.hgetall("held")}


@pytest.fixture
def started(harness: Harness) -> Started:
    return Started(harness)


# Each byte takes two starts. Every thirteenth meets numbers, words, line ends and what is between two commands as well.
@pytest.mark.each_redis("1")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_a_torn_file_has_what_was_whole_and_keeps_what_comes_next(started: Started, step: int) -> None:
    states = started.kill_after_writes()
    kept = started.data.with_name("kept")
    started.data.rename(kept)
    for torn in range(states[0][0], states[-1][0] + 1, step):
        shutil.copytree(kept, started.data, ignore=shutil.ignore_patterns("*.sock"))
        os.truncate(started.file, torn)
        whole = [state for size, state in states if size <= torn][-1]
        client = started.start()
        assert state(client) == whole, f"torn at {torn}"
        client_transaction(client)
        after = {**whole, "queue": ["a", *whole["queue"]], "sent": str(int(whole["sent"]) + 1)}
        started.stop()
        assert state(started.start()) == after, f"torn at {torn}"
        started.kill()
        shutil.rmtree(started.data)


def test_a_file_that_is_broken_and_not_torn_is_refused_and_left_alone(started: Started) -> None:
    states = started.kill_after_writes()
    before = bytearray(started.file.read_bytes())
    # The first line of the script's transaction, and with it a transaction behind which others are whole.
    before[states[1][0] + len("*1\r\n$5\r\nMULTI\r\n")] = ord("?")
    started.file.write_bytes(before)
    process = started.launch()
    assert started.ends() == 1, process.tail()
    assert "Bad file format reading the append only file" in process.log()
    assert "without its end" not in process.log()
    assert started.file.read_bytes() == before


def torn_in_a_transaction(started: Started) -> State:
    """Kill Redis and tear its file in the middle of a transaction; what is whole before it."""
    states = started.kill_after_writes()
    (size, whole), (end, _) = states[-2:]
    os.truncate(started.file, (size + end) // 2)
    return whole


def command(*words: bytes) -> bytes:
    """A command as Redis writes it."""
    return b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)])


MULTI, EXEC = command(b"MULTI"), command(b"EXEC")
PUSH, MORE = command(b"LPUSH", b"queue", b"a"), command(b"INCR", b"sent") * 20
# More than there is memory for.
BIG = command(b"LPUSH", b"queue", b"a" * 40_000_000)
MEMORY_KB = 30_000


def repair(started: Started, left: bytes, rest: bytes) -> bytes:
    """What docker/redis/repair makes of a file, with little memory; redis-check-aof gets as much as it likes."""
    tool = started.tool.with_name("roomy-check-aof")
    tool.write_text(f'#!/bin/sh\nulimit -Sv unlimited\nexec "{started.tool}" "$@"\n')
    tool.chmod(0o755)
    started.file.write_bytes(left + rest)
    repair = f'ulimit -Sv {MEMORY_KB}; exec sh "{ROOT / "docker" / "redis" / "repair"}" "{started.data}"'
    environment = {"PATH": os.environ["PATH"], "STALK_REDIS_CHECK_AOF": str(tool)}
    started.process = started.harness.process("repair", ["sh", "-c", repair], environment)
    assert started.ends() == 0, started.process.tail()
    return started.file.read_bytes()


@pytest.mark.parametrize(
    "rest",
    [
        MULTI + PUSH + EXEC[:-5],
        MULTI + PUSH + MORE[:-5] + bytes(5000),
        MULTI + command(b"LPUSH", b"queue", b"a\0\r\n" + EXEC) + PUSH[:9] + bytes(1),
        MULTI + PUSH + BIG[:-9],
    ],
    ids=["end-torn", "zero-bytes", "a-word-like-an-end", "big"],
)
def test_what_is_cut_off_is_kept(started: Started, rest: bytes) -> None:
    left = PUSH + MULTI + PUSH + EXEC
    for more in (rest, rest[:-1]):
        assert repair(started, left, more) == left
        assert (started.data / "cut-off.aof").read_bytes() == more
        assert f"cutting them off into {started.data / 'cut-off.aof'}" in started.process.log()


@pytest.mark.parametrize(
    "rest",
    [
        MULTI + b"?" + PUSH + EXEC + BIG + MULTI + PUSH + EXEC,
        MULTI + BIG.replace(b"$5", b"$6") + EXEC + MULTI + PUSH + EXEC,
        MULTI + PUSH + command(b"EXEB"),
        MULTI + PUSH + command(b"EXEB") + MORE,
        MULTI + PUSH + command(b"EXEB") + MORE[:-5],
        MULTI + PUSH + EXEC.replace(b"$4", b"$4000") + MORE,
        MULTI + PUSH + EXEC.replace(b"*1", b"*9") + MORE,
        MULTI + PUSH.replace(b"$1", b"$9000") + EXEC + MULTI + PUSH + EXEC,
        MULTI + PUSH + bytes(4096) + MORE,
        MULTI + PUSH + MULTI + PUSH + EXEC,
    ],
    ids=["mark", "length", "end", "end-before", "end-before-torn", "end-long", "end-many", "long", "zeros", "no-end"],
)
def test_what_no_crash_leaves_is_not_cut_off(started: Started, rest: bytes) -> None:
    left = PUSH + MULTI + PUSH + EXEC
    assert repair(started, left, rest) == left + rest
    assert f"is left to Redis, since what follows byte {len(left)} is not" in started.process.log()
    assert not list(started.data.glob("cut-off*"))


def test_a_transaction_that_cannot_be_kept_is_not_cut_off(started: Started) -> None:
    torn_in_a_transaction(started)
    before = started.file.read_bytes()
    (started.data / "cut-off.aof").mkdir()
    process = started.launch()
    assert started.ends() == 1
    assert "cut-off.aof cannot be written" in process.log()
    assert started.file.read_bytes() == before


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_password_is_read_from_a_file_as_clients_read_it(started: Started, end: str) -> None:
    path = started.harness.path("password")
    path.write_text(PASSWORD + end, newline="")
    started.login = {"REDIS_PASSWORD_FILE": str(path)}
    assert started.start().ping()


@pytest.fixture
def watched(started: Started) -> "Watched":
    return Watched(started)


class Watched:
    """Tells when a start looks at the file, and lets it go on looking only when told to."""

    def __init__(self, started: Started) -> None:
        self._started, tool, place = started, started.tool, started.tool.parent
        self._looks, self._gate = place / "looks", place / "gate"
        os.mkfifo(self._gate)
        started.tool = place / "watched-check-aof"
        started.tool.write_text(f'#!/bin/sh\ntouch "{self._looks}"\nread -r _ <"{self._gate}"\nexec "{tool}" "$@"\n')
        started.tool.chmod(0o755)

    def looks(self) -> bool:
        return self._looks.exists()

    def wait(self) -> None:
        """Wait until the start looks at the file."""
        wait_until(self.looks, START_SECONDS, "the start looks at the file", self._started.process.tail)
        self._looks.unlink()

    def go_on(self) -> None:
        self._gate.write_text("go on\n")


def test_after_an_orderly_end_the_file_is_not_looked_at(started: Started, watched: Watched) -> None:
    started.start().set("sent", 1)
    started.stop()
    assert started.start().get("sent") == "1"
    assert not watched.looks()
    started.kill()
    started.launch()
    watched.wait()


def test_a_start_that_is_told_to_end_or_killed_while_it_looks_is_made_again(started: Started, watched: Watched) -> None:
    whole = torn_in_a_transaction(started)
    before = started.file.read_bytes()
    process = started.launch()
    watched.wait()
    process.end()
    assert started.file.read_bytes() == before

    process = started.launch()
    watched.wait()
    process.terminate()
    watched.go_on()
    assert started.ends() == 128 + signal.SIGTERM
    assert "Redis is starting" not in process.log()

    started.launch()
    watched.go_on()
    assert state(started.connect()) == whole


def test_without_its_tool_redis_starts_as_it_would_and_the_log_says_so(started: Started) -> None:
    whole = torn_in_a_transaction(started)
    started.tool.unlink()
    assert state(started.start()) == whole
    assert "cannot say up to where it is whole" in started.process.log()


def test_what_a_killed_rewrite_has_left_is_deleted(started: Started) -> None:
    client = started.start()
    # A tenth of a second for each key.
    client.config_set("rdb-key-save-delay", 100_000)
    for key in range(1000):
        client.set(str(key), "")
    client.bgrewriteaof()

    def left() -> list[Path]:
        return list(started.data.glob("temp-*"))

    wait_until(left, ANSWER_SECONDS, "the rewrite writes", started.process.tail)
    started.process.end()
    assert left()
    assert started.start().dbsize() == 1000
    assert not left()
