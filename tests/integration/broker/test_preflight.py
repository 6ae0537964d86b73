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
from tests.integration.broker.test_urls import MASTER, start_sentinel
from tests.support.ports import free_port
from tests.support.processes import children
from tests.support.redis.server import RedisServer, disguise, make_certificates, require_tls
from tests.support.world import Node, World

pytestmark = pytest.mark.each_redis

PATIENCE = 120
REFUSED = 3
VOLATILE = ("appendonly no",)
EVICTS = "throws away waiting tasks"


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

    def refusal(self, redis: RedisServer, **settings: str) -> str:
        """What is said of a Redis that is refused."""
        code, said = self(redis, **settings)
        assert code == REFUSED, said
        return said


def command_in(text: str) -> list[str]:
    """The redis-cli command that a message gives as the remedy."""
    found = re.search(r"'redis-cli ([^']+)'", text)
    assert found, text
    return found[1].split()


def test_a_safe_redis_passes_without_a_word(world: World, check: Checker) -> None:
    assert check(world.redis()) == (0, "")


# What a redis.conf has, and what is said of it beside the command that mends it.
MENDED = {
    "allkeys-lru": (["maxmemory-policy allkeys-lru"], REFUSED, ["its maxmemory-policy is allkeys-lru", EVICTS]),
    "volatile-ttl": (["maxmemory-policy volatile-ttl"], REFUSED, ["its maxmemory-policy is volatile-ttl", EVICTS]),
    "volatile": (VOLATILE, REFUSED, ["it keeps nothing on disk", "BROKER_ALLOW_VOLATILE=1"]),
    "timeout": (["timeout 30"], 0, ["warning", "idle for 30 s"]),
}


@pytest.mark.parametrize("case", MENDED)
def test_a_setting_that_is_not_safe_is_named_with_the_command_that_mends_it(
    world: World, check: Checker, case: str
) -> None:
    lines, expected, phrases = MENDED[case]
    redis = world.redis(lines=lines)

    code, said = check(redis)

    assert code == expected
    for phrase in (f"CELERY_BROKER_URL (redis://:***@127.0.0.1:{redis.port}/0): it", *phrases):
        assert phrase in said
    redis.ask(*command_in(said))
    assert check(redis) == (0, "")


def test_a_redis_that_keeps_nothing_is_accepted_when_losing_tasks_is_meant(world: World, check: Checker) -> None:
    code, said = check(world.redis(lines=VOLATILE), BROKER_ALLOW_VOLATILE="1")

    assert code == 0
    assert said.startswith("preflight: warning: CELERY_BROKER_URL")
    assert "it keeps nothing on disk" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [("guessed", "Redis knows no such user or the password is wrong"), ("", "Redis wants a password and got none")],
)
def test_a_wrong_login_is_refused_in_words(world: World, check: Checker, given: str, said: str) -> None:
    heard = check.refusal(world.redis(), REDIS_PASSWORD=given)

    assert heard.count(said) == 1
    assert "REDIS_PASSWORD" in heard
    assert "waiting" not in heard
    assert not given or given not in heard


def test_a_password_that_redis_does_not_want_does_no_harm(world: World, check: Checker) -> None:
    assert check(world.redis(""), REDIS_PASSWORD="needless") == (0, "")


def test_an_unknown_user_is_refused_in_words(world: World, check: Checker) -> None:
    redis = world.redis()

    said = check.refusal(redis, CELERY_BROKER_URL=redis.url(user="nobody", password="secret"))

    assert "Redis knows no such user or the password is wrong" in said
    assert "secret" not in said


# What a managed Redis allows: CONFIG is its operator's.
MANAGED = "user managed on >secret ~* &* +@all -config"
# And one that keeps INFO to itself as well.
CLOSED = "user managed on >secret ~* &* +@all -config -info"
UNCHECKED = "not everything could be checked"
MAY_NOT_RUN_SCRIPTS = "its user may not do what Stalk's scripts do"
# What a redis.conf has, and what is said of it to a user with the rights in it; None: to the default user.
SAID = {
    "snapshots alone": (
        [*VOLATILE, "save 3600 1"],
        None,
        0,
        ["warning", "what was sent since its last snapshot is lost"],
    ),
    "without CONFIG": ([], MANAGED, 0, [UNCHECKED, "CONFIG GET timeout"]),
    "evicts, without CONFIG": (
        ["maxmemory-policy allkeys-lru"],
        MANAGED,
        REFUSED,
        ["its maxmemory-policy is allkeys-lru"],
    ),
    "keeps nothing, without CONFIG": (
        VOLATILE,
        MANAGED,
        0,
        ["its append-only file is off, and whether it writes snapshots cannot be read"],
    ),
    "without INFO": (
        [],
        CLOSED,
        0,
        ["INFO", "CONFIG GET maxmemory-policy", "CONFIG GET save", "CONFIG GET timeout"],
    ),
    "no EVAL": ([], "user managed on >secret &* ~* +@all -eval", REFUSED, [MAY_NOT_RUN_SCRIPTS]),
    "no EVALSHA": ([], "user managed on >secret &* ~* +@all -evalsha", REFUSED, [MAY_NOT_RUN_SCRIPTS]),
    # Beat needs fewer keys than a worker.
    "not all keys": ([], f"user managed on >secret &* ~{UNACKED}* +@all", 0, [UNCHECKED]),
    "no scripts at all": (['rename-command EVAL ""'], None, REFUSED, ["allow it EVAL"]),
}


def as_managed(redis: RedisServer) -> Mapping[str, str]:
    return {"CELERY_BROKER_URL": redis.url(user="managed", password="secret")}


@pytest.mark.parametrize("case", SAID)
def test_a_redis_is_checked_as_far_as_its_user_may_look(world: World, check: Checker, case: str) -> None:
    lines, user, expected, phrases = SAID[case]
    redis = world.redis(lines=[*lines, *([user] if user else [])])

    code, said = check(redis, **(as_managed(redis) if user else {}))

    assert code == expected
    for phrase in phrases:
        assert phrase in said
    # INFO has the policy as well.
    assert ("CONFIG GET maxmemory-policy" in said) is (case == "without INFO")
    if case == "not all keys":
        assert re.search(r"refused were .*EVAL: .*\bkeys?\b", said)


def test_a_replica_is_refused(world: World, check: Checker) -> None:
    # By default it waits 5 s for more replicas before it sends its first copy.
    master = world.redis("", lines=["repl-diskless-sync-delay 0"])
    replica = world.redis("", lines=[f"replicaof 127.0.0.1 {master.port}"])
    # While it loads that, it answers nobody, and a worker would wait.
    linked = replica.client()
    world.wait_until(lambda: linked.info("replication")["master_link_status"] == "up", PATIENCE, "it has its copy")

    assert "it is a replica" in check.refusal(replica)


def test_a_version_that_is_too_old_is_refused(world: World, check: Checker) -> None:
    program, version = disguise(world.directory / "redis-server")

    assert f"it is version {version}, and 6.2 or newer is needed" in check.refusal(world.redis(program=program))


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

    said = check.refusal(redis, CELERY_BROKER_URL=url, CELERY_RESULT_BACKEND=url)

    assert "it is a Redis Cluster" in said
    assert "waiting" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("user", "database"), [("", 1), ("managed", 0)])
def test_a_cluster_is_refused_for_results_too(world: World, check: Checker, user: str, database: int) -> None:
    results = world.redis(lines=[*CLUSTER, f"user managed on >secret {RESULTS_ONLY} &* +@all -info"])
    url = results.url(database, user=user, password="secret" if user else None)

    said = check.refusal(world.redis(), CELERY_RESULT_BACKEND=url)

    assert "CELERY_RESULT_BACKEND" in said
    assert "it is a Redis Cluster" in said


@pytest.mark.parametrize("slots", [(), SLOTS], ids=["without-slots", "with-slots"])
def test_a_cluster_is_known_by_what_it_says_of_scripts(world: World, check: Checker, slots: Iterable[int]) -> None:
    redis = world.redis(lines=[*CLUSTER, f"{CLOSED} -exists"])
    if slots:
        redis.ask("CLUSTER", "ADDSLOTS", *map(str, slots))
        wait_for_cluster(world, redis)

    assert "it is a Redis Cluster" in check.refusal(redis, **as_managed(redis))


def test_a_server_whose_scripts_must_declare_their_keys_is_refused(
    world: World, check: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dragonfly's own words cannot be had here; a cluster that has the declared keys alone refuses the same.
    monkeypatch.setattr(preflight, "UNACKED_KEYS", [UNACKED])
    redis = world.redis(lines=[*CLUSTER, f"{CLOSED} -exists"])
    redis.ask("CLUSTER", "ADDSLOTS", str(redis.ask("CLUSTER", "KEYSLOT", UNACKED)))
    wait_for_cluster(world, redis)

    said = check.refusal(redis, **as_managed(redis))

    assert re.search(r"its scripts may touch only keys that they were told of \(.*cript attempted to access", said)
    assert "Dragonfly" in said


def test_results_need_no_scripts_and_no_keys_but_their_own(world: World, check: Checker) -> None:
    results = world.redis(lines=[f"user managed on >secret {RESULTS_ONLY} &* +@all -eval -evalsha"])

    assert check(world.redis(), CELERY_RESULT_BACKEND=results.url(1, user="managed", password="secret")) == (0, "")


@pytest.fixture(scope="module")
def certificates(shared_world: World) -> Path:
    require_tls(shared_world.directory)
    return make_certificates(shared_world.path("certificates"))


def by_sentinel(url: str) -> dict[str, str]:
    return {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "CELERY_SENTINEL_MASTER": MASTER}


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
    port = redis.port if scheme == "rediss" else start_sentinel(world, redis).port
    url = f"{scheme}://localhost:{port}/0?{options}"

    said = check.refusal(redis, **by_sentinel(url))

    assert "its certificate is not accepted (certificate verify failed: " in said
    assert "ssl_ca_certs of CELERY_BROKER_URL" in said
    assert len(said.splitlines()) == 1


def test_a_master_whose_certificate_is_for_another_address_is_refused_in_words(world: World, check: Checker) -> None:
    require_tls(world.directory)
    # The sentinel is asked for by its name, and names its master by an address.
    certificates = make_certificates(world.path("certificates"), "DNS:localhost")
    redis = world.redis("", certificates=certificates)
    url = f"sentinel://localhost:{start_sentinel(world, redis).port}/0?ssl_ca_certs={certificates / 'ca.crt'}"
    settings = by_sentinel(url)

    said = check.refusal(redis, **settings)

    assert "its certificate is not accepted (certificate verify failed: IP address mismatch" in said
    url += "&ssl_check_hostname=false"
    assert check(redis, **by_sentinel(url)) == (0, "")


def test_results_on_the_brokers_server_are_looked_at_where_tls_differs(
    world: World, check: Checker, certificates: Path
) -> None:
    redis = world.redis("", certificates=certificates)

    said = check.refusal(redis, CELERY_RESULT_BACKEND=f"rediss://localhost:{redis.port}/1")

    assert said.startswith("preflight: error: CELERY_RESULT_BACKEND")


def test_a_version_of_tls_that_the_server_does_not_speak_is_refused(
    world: World, check: Checker, certificates: Path
) -> None:
    redis = world.redis("", certificates=certificates, lines=["tls-protocols TLSv1.2"])

    said = check.refusal(redis, CELERY_BROKER_URL=f"{redis.url()}&ssl_min_version=TLSv1.3")

    assert "it speaks no TLS, or not as asked to (" in said
    assert "ssl_ options in CELERY_BROKER_URL" in said


@pytest.mark.parametrize("given", ["", "guessed"])
def test_a_wrong_password_of_sentinels_is_refused_in_words(world: World, check: Checker, given: str) -> None:
    redis = world.redis("")
    settings = by_sentinel(f"sentinel://127.0.0.1:{start_sentinel(world, redis, 'secret').port}/0")

    said = check.refusal(redis, **settings, CELERY_SENTINEL_PASSWORD=given)

    assert "correct CELERY_SENTINEL_PASSWORD" in said
    assert "waiting" not in said
    assert check(redis, **settings, CELERY_SENTINEL_PASSWORD="secret") == (0, "")


def test_sentinels_that_name_no_master_are_waited_for_in_one_line(world: World) -> None:
    redis = world.redis("")
    sentinel = start_sentinel(world, redis, name="another")
    gone = free_port()
    url = f"sentinel://127.0.0.1:{sentinel.port}/0;sentinel://127.0.0.1:{gone}/0"
    beat = world.stack(redis, **by_sentinel(url)).beat()
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
    beat = waits(world, redis, ".*refused")

    redis.start()

    name = rf"CELERY_BROKER_URL \(redis://:\*\*\*@127.0.0.1:{redis.port}/0\)"
    beat.says(rf"preflight: goes on after [\d.]+ s of waiting for {name}").says("beat: ticking")
    assert beat.process.count("preflight: waiting") == 1


def test_a_redis_that_cannot_write_to_its_disk_is_waited_for(world: World) -> None:
    redis = world.redis(lines=["save 3600 1"])
    # A file cannot take the place of a directory.
    obstacle = redis.directory / "dump.rdb"
    obstacle.mkdir()
    redis.ask("BGSAVE")
    world.wait_until(lambda: "MISCONF" in str(said_by(redis)), PATIENCE, "Redis refuses")
    beat = waits(world, redis, "MISCONF .*")

    obstacle.rmdir()
    redis.ask("SAVE")

    beat.says("beat: ticking")


def test_a_redis_that_runs_a_script_for_long_is_waited_for(world: World) -> None:
    redis = world.redis(lines=["lua-time-limit 1"])
    script = threading.Thread(target=said_by, args=[redis, "EVAL", "while true do end", "0"])
    script.start()
    world.wait_until(lambda: "BUSY" in str(said_by(redis)), PATIENCE, "Redis refuses")
    beat = waits(world, redis, "BUSY .*")

    redis.ask("SCRIPT", "KILL")

    beat.says("beat: ticking")
    script.join()


def waits(world: World, redis: RedisServer, reason: str) -> Node:
    """A beat that waits for this Redis, and says why."""
    name = rf"CELERY_BROKER_URL \(redis://:\*\*\*@127.0.0.1:{redis.port}/0\)"
    return world.stack(redis).beat().says(rf"preflight: waiting for {name}: {reason}")


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
