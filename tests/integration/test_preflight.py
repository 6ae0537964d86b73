"""Pre-flight against Redis servers that are configured in every way that matters."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping

import pytest

from config import load
from services import preflight
from tests.support.processes import children
from tests.support.redis_server import RedisServer, disguised
from tests.support.world import World

pytestmark = pytest.mark.each_redis

PATIENCE = 120
REFUSED = 3
VOLATILE = ("appendonly no",)


@pytest.fixture
def check(world: World, capsys: pytest.CaptureFixture[str]) -> Checker:
    """Runs the pre-flight of a worker or beat."""
    return Checker(world, capsys)


class Checker:
    """The check that worker and beat make before they start: its exit code, 0 for none, and what it says."""

    def __init__(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self._world, self._capsys = world, capsys

    def __call__(self, redis: RedisServer, **settings: str) -> tuple[int, str]:
        environment = self._world.stack(redis, **settings).environment()
        code = 0
        try:
            preflight.check(load(environment))
        except SystemExit as exit:
            code = int(str(exit.code))
        return code, self._capsys.readouterr().err


def command_in(text: str) -> list[str]:
    """The redis-cli command that a message gives as the remedy."""
    found = re.search(r"'redis-cli ([^']+)'", text)
    assert found, text
    return found[1].split()


def test_a_safe_redis_passes_without_a_word(world: World, check: Checker) -> None:
    assert check(world.redis()) == (0, "")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_evicts_is_refused_with_the_command_that_mends_it(
    world: World, check: Checker, policy: str
) -> None:
    redis = world.redis(lines=[f"maxmemory-policy {policy}"])

    code, said = check(redis)

    assert code == REFUSED
    assert f"CELERY_BROKER_URL (redis://:***@127.0.0.1:{redis.port}/0): its maxmemory-policy is {policy}" in said
    assert "throws away waiting tasks" in said
    redis.ask(*command_in(said))
    assert check(redis) == (0, "")


def test_a_redis_that_keeps_nothing_is_refused_with_the_command_that_mends_it(world: World, check: Checker) -> None:
    redis = world.redis(lines=VOLATILE)

    code, said = check(redis)

    assert code == REFUSED
    assert "it keeps nothing on disk" in said
    assert "BROKER_ALLOW_VOLATILE=1" in said
    redis.ask(*command_in(said))
    assert check(redis) == (0, "")


def test_a_redis_that_keeps_nothing_is_accepted_when_losing_tasks_is_meant(world: World, check: Checker) -> None:
    code, said = check(world.redis(lines=VOLATILE), BROKER_ALLOW_VOLATILE="1")

    assert code == 0
    assert said.startswith("preflight: warning: CELERY_BROKER_URL")
    assert "it keeps nothing on disk" in said


def test_snapshots_alone_are_a_warning(world: World, check: Checker) -> None:
    code, said = check(world.redis(lines=[*VOLATILE, "save 3600 1"]))

    assert code == 0
    assert "warning" in said
    assert "what was sent since its last snapshot is lost" in said


def test_a_timeout_is_a_warning_with_the_command_that_mends_it(world: World, check: Checker) -> None:
    redis = world.redis(lines=["timeout 30"])

    code, said = check(redis)

    assert code == 0
    assert "warning" in said
    assert "idle for 30 s" in said
    redis.ask(*command_in(said))
    assert check(redis) == (0, "")


@pytest.mark.parametrize(
    ("given", "said"),
    [("guessed", "Redis knows no such user or the password is wrong"), ("", "Redis wants a password and got none")],
)
def test_a_wrong_login_is_refused_in_words(world: World, check: Checker, given: str, said: str) -> None:
    code, heard = check(world.redis(), REDIS_PASSWORD=given)

    assert code == REFUSED
    assert heard.count(said) == 1
    assert "REDIS_PASSWORD" in heard
    assert "waiting" not in heard
    assert not given or given not in heard


def test_a_password_that_redis_does_not_want_does_no_harm(world: World, check: Checker) -> None:
    assert check(world.redis(""), REDIS_PASSWORD="needless") == (0, "")


def test_an_unknown_user_is_refused_in_words(world: World, check: Checker) -> None:
    redis = world.redis()

    code, said = check(redis, CELERY_BROKER_URL=redis.url(user="nobody", password="secret"))

    assert code == REFUSED
    assert "Redis knows no such user or the password is wrong" in said
    assert "secret" not in said


# What a managed Redis allows: CONFIG is its operator's.
MANAGED = "user managed on >secret ~* &* +@all -config"
# And one that keeps INFO to itself as well.
CLOSED = "user managed on >secret ~* &* +@all -config -info"


def as_managed(redis: RedisServer) -> Mapping[str, str]:
    return {"CELERY_BROKER_URL": redis.url(user="managed", password="secret")}


def test_without_config_get_info_is_used_and_the_rest_is_named(world: World, check: Checker) -> None:
    redis = world.redis(lines=[MANAGED])

    code, said = check(redis, **as_managed(redis))

    assert code == 0
    assert "not everything could be checked" in said
    assert "CONFIG GET timeout" in said
    assert "CONFIG GET maxmemory-policy" not in said


def test_without_config_get_an_evicting_redis_is_refused_all_the_same(world: World, check: Checker) -> None:
    redis = world.redis(lines=[MANAGED, "maxmemory-policy allkeys-lru"])

    code, said = check(redis, **as_managed(redis))

    assert code == REFUSED
    assert "its maxmemory-policy is allkeys-lru" in said


def test_without_config_get_missing_persistence_is_a_warning(world: World, check: Checker) -> None:
    redis = world.redis(lines=[MANAGED, *VOLATILE])

    code, said = check(redis, **as_managed(redis))

    assert code == 0
    assert "its append-only file is off, and whether it writes snapshots cannot be read" in said


def test_without_info_all_that_could_not_be_checked_is_named(world: World, check: Checker) -> None:
    redis = world.redis(lines=[CLOSED])

    code, said = check(redis, **as_managed(redis))

    assert code == 0
    for command in ("INFO", "CONFIG GET maxmemory-policy", "CONFIG GET save", "CONFIG GET timeout"):
        assert command in said


def test_a_replica_is_refused(world: World, check: Checker) -> None:
    master = world.redis("")
    replica = world.redis("", lines=[f"replicaof 127.0.0.1 {master.port}"])

    code, said = check(replica)

    assert code == REFUSED
    assert "it is a replica" in said


def test_a_version_that_is_too_old_is_refused(world: World, check: Checker) -> None:
    program, version = disguised(world.directory / "redis-server")

    code, said = check(world.redis(program=program))

    assert code == REFUSED
    assert f"it is version {version}, and 6.2 or newer is needed" in said


def test_a_server_of_its_own_for_results_may_forget_them_but_not_evict(world: World, check: Checker) -> None:
    broker, volatile, evicting = (
        world.redis(),
        world.redis(lines=VOLATILE),
        world.redis(lines=["maxmemory-policy allkeys-lru"]),
    )

    forgets, said_of_volatile = check(broker, CELERY_RESULT_BACKEND=volatile.url(1))
    evicts, said_of_evicting = check(broker, CELERY_RESULT_BACKEND=evicting.url(1))

    assert (forgets, evicts) == (0, REFUSED)
    assert "CELERY_RESULT_BACKEND" in said_of_volatile
    assert "CELERY_RESULT_BACKEND" in said_of_evicting
    assert "CELERY_BROKER_URL" not in said_of_evicting


@pytest.mark.parametrize("role", ["worker", "beat"])
def test_worker_and_beat_exit_with_3_before_anything_starts(world: World, role: str) -> None:
    stack = world.stack(world.redis(lines=["maxmemory-policy allkeys-lru"]))
    process = stack.worker() if role == "worker" else stack.beat()

    assert process.exits(PATIENCE) == REFUSED
    assert process.process.log().startswith("preflight: error: ")
    assert len(process.process.log().splitlines()) == 1


def test_a_redis_that_does_not_answer_is_waited_for(world: World) -> None:
    redis = world.redis()
    redis.stop()
    beat = world.stack(redis).beat()
    beat.says(
        rf"preflight: waiting for CELERY_BROKER_URL \(redis://:\*\*\*@127.0.0.1:{redis.port}/0\): .*refused", times=2
    )

    redis.start()

    beat.says("beat: ticking")
    assert beat.process.count(r"next try in [\d.]+ s") >= 2


def test_waiting_for_redis_ends_when_told_as_process_1_of_a_container(world: World) -> None:
    redis = world.redis()
    redis.stop()
    stack = world.stack(redis)
    command = ["unshare", "--pid", "--fork", sys.executable, "-m", "services.launch", "worker"]
    process = world.process("worker", command, stack.environment())
    world.wait_until(lambda: not process.alive or process.count("waiting for"), PATIENCE, "it waits, or may not run")
    if not process.alive and "unshare" in process.log():
        pytest.skip("no process namespace can be made by this user")

    os.kill(children(process.pid)[0], signal.SIGTERM)

    world.wait_until(lambda: not process.alive, PATIENCE, "it leaves")
    assert process.code == 0
