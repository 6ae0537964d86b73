"""Pre-flight against Redis servers that are configured in every way that matters."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from config import load
from services.broker import preflight
from services.broker.keys import UNACKED
from tests.support.ports import free_port
from tests.support.processes import children
from tests.support.redis.server import RedisServer, disguise, make_certificates, require_tls
from tests.support.world import World

pytestmark = pytest.mark.each_redis

PATIENCE = 120
REFUSED = 3
VOLATILE = ("appendonly no",)


@pytest.fixture
def check(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Checker:
    """Runs the pre-flight of a worker or beat, which has nothing to wait for."""
    monkeypatch.setattr(preflight, "sleep", lambda _: pytest.fail(capsys.readouterr().err))
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
    # By default it waits 5 s for more replicas before it sends its first copy.
    master = world.redis("", lines=["repl-diskless-sync-delay 0"])
    replica = world.redis("", lines=[f"replicaof 127.0.0.1 {master.port}"])
    # While it loads that, it answers nobody, and a worker would wait.
    linked = replica.client()
    world.wait_until(lambda: linked.info("replication")["master_link_status"] == "up", PATIENCE, "it has its copy")

    code, said = check(replica)

    assert code == REFUSED
    assert "it is a replica" in said


def test_a_version_that_is_too_old_is_refused(world: World, check: Checker) -> None:
    program, version = disguise(world.directory / "redis-server")

    code, said = check(world.redis(program=program))

    assert code == REFUSED
    assert f"it is version {version}, and 6.2 or newer is needed" in said


CLUSTER = ("cluster-enabled yes", "cluster-require-full-coverage no")
SLOTS = range(16384)
# What a user needs who keeps nothing but results.
RESULTS_ONLY = "~celery-task-meta-* ~celery-taskset-meta-*"


def wait_for_cluster(world: World, redis: RedisServer) -> None:
    """A cluster takes its time to be one."""
    world.wait_until(lambda: "cluster_state:ok" in str(redis.ask("CLUSTER", "INFO")), PATIENCE, "the cluster is up")


@pytest.mark.parametrize("slots", [(), SLOTS], ids=["without-slots", "with-slots"])
@pytest.mark.parametrize("may", ["+@all", "+@all -info -cluster"])
@pytest.mark.parametrize("database", [0, 1])
def test_a_cluster_is_refused_by_name(
    world: World, check: Checker, slots: Iterable[int], may: str, database: int
) -> None:
    redis = world.redis(lines=[*CLUSTER, f"user managed on >secret ~* &* {may}"])
    if slots:
        redis.ask("CLUSTER", "ADDSLOTS", *map(str, slots))
    url = redis.url(database, user="managed", password="secret")

    code, said = check(redis, CELERY_BROKER_URL=url, CELERY_RESULT_BACKEND=url)

    assert code == REFUSED
    assert "it is a Redis Cluster" in said
    assert "waiting" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("user", "database"), [("", 1), ("managed", 0)])
def test_a_cluster_is_refused_for_results_too(world: World, check: Checker, user: str, database: int) -> None:
    results = world.redis(lines=[*CLUSTER, f"user managed on >secret {RESULTS_ONLY} &* +@all -info"])
    url = results.url(database, user=user, password="secret" if user else None)

    code, said = check(world.redis(), CELERY_RESULT_BACKEND=url)

    assert code == REFUSED
    assert "CELERY_RESULT_BACKEND" in said
    assert "it is a Redis Cluster" in said


@pytest.mark.parametrize("slots", [(), SLOTS], ids=["without-slots", "with-slots"])
def test_a_cluster_is_known_by_what_it_says_of_scripts(world: World, check: Checker, slots: Iterable[int]) -> None:
    redis = world.redis(lines=[*CLUSTER, f"{CLOSED} -exists"])
    if slots:
        redis.ask("CLUSTER", "ADDSLOTS", *map(str, slots))
        wait_for_cluster(world, redis)

    code, said = check(redis, **as_managed(redis))

    assert code == REFUSED
    assert "it is a Redis Cluster" in said


def test_a_server_whose_scripts_must_declare_their_keys_is_refused(
    world: World, check: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dragonfly's own words cannot be had here; a cluster that has the declared keys alone refuses the same.
    monkeypatch.setattr(preflight, "HELD", [UNACKED])
    redis = world.redis(lines=[*CLUSTER, f"{CLOSED} -exists"])
    redis.ask("CLUSTER", "ADDSLOTS", str(redis.ask("CLUSTER", "KEYSLOT", UNACKED)))
    wait_for_cluster(world, redis)

    code, said = check(redis, **as_managed(redis))

    assert code == REFUSED
    assert re.search(r"its scripts may touch only keys that they were told of \(.*cript attempted to access", said)
    assert "Dragonfly" in said


@pytest.mark.parametrize("user", ["~* +@all -eval", "~* +@all -evalsha"], ids=["no-eval", "no-evalsha"])
def test_a_user_who_may_not_run_scripts_is_refused(world: World, check: Checker, user: str) -> None:
    redis = world.redis(lines=[f"user managed on >secret &* {user}"])

    code, said = check(redis, **as_managed(redis))

    assert code == REFUSED
    assert "its user may not do what Stalk's scripts do" in said


def test_a_user_who_may_not_touch_all_keys_is_warned(world: World, check: Checker) -> None:
    """Beat needs fewer than a worker."""
    redis = world.redis(lines=[f"user managed on >secret &* ~{UNACKED}* +@all"])

    code, said = check(redis, **as_managed(redis))

    assert code == 0
    assert re.search(r"not everything could be checked; refused were .*EVAL: .*\bkeys?\b", said)


def test_a_server_that_runs_no_scripts_at_all_is_refused(world: World, check: Checker) -> None:
    code, said = check(world.redis(lines=['rename-command EVAL ""']))

    assert code == REFUSED
    assert "allow it EVAL" in said


def test_results_need_no_scripts_and_no_keys_but_their_own(world: World, check: Checker) -> None:
    results = world.redis(lines=[f"user managed on >secret {RESULTS_ONLY} &* +@all -eval -evalsha"])

    assert check(world.redis(), CELERY_RESULT_BACKEND=results.url(1, user="managed", password="secret")) == (0, "")


@pytest.fixture(scope="module")
def certificates(shared_world: World) -> Path:
    require_tls(shared_world.directory)
    return make_certificates(shared_world.path("certificates"))


def sentinel_of(world: World, master: RedisServer, certificates: Path) -> RedisServer:
    watch = f"sentinel monitor the-master 127.0.0.1 {master.port} 1"
    return world.redis("", lines=[watch], certificates=certificates, sentinel=True)


@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
@pytest.mark.parametrize("foreign", ["server", "name", "authority"])
def test_a_certificate_that_is_not_accepted_is_refused_in_words(
    world: World, check: Checker, certificates: Path, scheme: str, foreign: str
) -> None:
    shown = (
        make_certificates(world.path("certificates"), "DNS:redis.example.com") if foreign == "name" else certificates
    )
    trusted = make_certificates(world.path("certificates")) if foreign == "server" else shown
    options = "ssl_cert_reqs=required" if foreign == "authority" else f"ssl_ca_certs={trusted / 'ca.crt'}"
    redis = world.redis("", certificates=shown)
    port = redis.port if scheme == "rediss" else sentinel_of(world, redis, shown).port
    url = f"{scheme}://localhost:{port}/0?{options}"

    code, said = check(redis, CELERY_BROKER_URL=url, CELERY_RESULT_BACKEND=url, CELERY_SENTINEL_MASTER="the-master")

    assert code == REFUSED
    assert "its certificate is not accepted (certificate verify failed: " in said
    assert "ssl_ca_certs of CELERY_BROKER_URL" in said
    assert len(said.splitlines()) == 1


def test_a_master_whose_certificate_is_for_another_address_is_refused_in_words(world: World, check: Checker) -> None:
    require_tls(world.directory)
    # The sentinel is asked for by its name, and names its master by an address.
    certificates = make_certificates(world.path("certificates"), "DNS:localhost")
    redis = world.redis("", certificates=certificates)
    url = (
        f"sentinel://localhost:{sentinel_of(world, redis, certificates).port}/0?ssl_ca_certs={certificates / 'ca.crt'}"
    )
    settings = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "CELERY_SENTINEL_MASTER": "the-master"}

    code, said = check(redis, **settings)

    assert code == REFUSED
    assert "its certificate is not accepted (certificate verify failed: IP address mismatch" in said
    url += "&ssl_check_hostname=false"
    assert check(redis, **settings | {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}) == (0, "")


def test_results_on_the_brokers_server_are_looked_at_where_tls_differs(
    world: World, check: Checker, certificates: Path
) -> None:
    redis = world.redis("", certificates=certificates)

    code, said = check(redis, CELERY_RESULT_BACKEND=f"rediss://localhost:{redis.port}/1")

    assert code == REFUSED
    assert said.startswith("preflight: error: CELERY_RESULT_BACKEND")


def test_a_version_of_tls_that_the_server_does_not_speak_is_refused(
    world: World, check: Checker, certificates: Path
) -> None:
    redis = world.redis("", certificates=certificates, lines=["tls-protocols TLSv1.2"])

    code, said = check(redis, CELERY_BROKER_URL=f"{redis.url()}&ssl_min_version=TLSv1.3")

    assert code == REFUSED
    assert "it speaks no TLS, or not as asked to (" in said
    assert "ssl_ options in CELERY_BROKER_URL" in said


@pytest.mark.parametrize("given", ["", "guessed"])
def test_a_wrong_password_of_sentinels_is_refused_in_words(world: World, check: Checker, given: str) -> None:
    redis = world.redis("")
    lines = ["requirepass secret", f"sentinel monitor the-master 127.0.0.1 {redis.port} 1"]
    url = f"sentinel://127.0.0.1:{world.redis('secret', lines=lines, sentinel=True).port}/0"
    settings = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "CELERY_SENTINEL_MASTER": "the-master"}

    code, said = check(redis, **settings, CELERY_SENTINEL_PASSWORD=given)

    assert code == REFUSED
    assert "correct CELERY_SENTINEL_PASSWORD" in said
    assert "waiting" not in said
    assert check(redis, **settings, CELERY_SENTINEL_PASSWORD="secret") == (0, "")


def test_sentinels_that_name_no_master_are_waited_for_in_one_line(world: World) -> None:
    redis = world.redis("")
    sentinel = world.redis("", lines=[f"sentinel monitor another 127.0.0.1 {redis.port} 1"], sentinel=True)
    gone = free_port()
    url = f"sentinel://127.0.0.1:{sentinel.port}/0;sentinel://127.0.0.1:{gone}/0"
    beat = world.stack(
        redis, CELERY_BROKER_URL=url, CELERY_RESULT_BACKEND=url, CELERY_SENTINEL_MASTER="the-master"
    ).beat()
    beat.says(
        rf"waiting for CELERY_BROKER_URL \(.*\): no sentinel names a master the-master \(127.0.0.1:{sentinel.port} "
        rf"knows none that is up; 127.0.0.1:{gone}: .*refused"
    )

    sentinel.ask("SENTINEL", "MONITOR", "the-master", "127.0.0.1", str(redis.port), "1")

    beat.says("beat: ticking")


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
    name = rf"CELERY_BROKER_URL \(redis://:\*\*\*@127.0.0.1:{redis.port}/0\)"
    beat.says(rf"preflight: waiting for {name}: .*refused")

    redis.start()

    beat.says(rf"preflight: goes on after [\d.]+ s of waiting for {name}").says("beat: ticking")
    assert beat.process.count("preflight: waiting") == 1


def test_a_redis_that_cannot_write_to_its_disk_is_waited_for(world: World) -> None:
    redis = world.redis(lines=["save 3600 1"])
    # A file cannot take the place of a directory.
    obstacle = redis.directory / "dump.rdb"
    obstacle.mkdir()
    redis.ask("BGSAVE")
    world.wait_until(lambda: "MISCONF" in str(said_by(redis)), PATIENCE, "Redis refuses")
    beat = world.stack(redis).beat()
    beat.says(r"preflight: waiting for CELERY_BROKER_URL \(.*\): MISCONF .*")

    obstacle.rmdir()
    redis.ask("SAVE")

    beat.says("beat: ticking")


def test_a_redis_that_runs_a_script_for_long_is_waited_for(world: World) -> None:
    redis = world.redis(lines=["lua-time-limit 1"])
    script = threading.Thread(target=said_by, args=[redis, "EVAL", "while true do end", "0"])
    script.start()
    world.wait_until(lambda: "BUSY" in str(said_by(redis)), PATIENCE, "Redis refuses")
    beat = world.stack(redis).beat()
    beat.says(r"preflight: waiting for CELERY_BROKER_URL \(.*\): BUSY .*")

    redis.ask("SCRIPT", "KILL")

    beat.says("beat: ticking")
    script.join()


def said_by(redis: RedisServer, *command: str) -> object:
    """What Redis answers, or why it does not."""
    try:
        return redis.ask(*(command or ["PING"]))
    except RedisError as error:
        return error


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
