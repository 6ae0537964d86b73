"""Pre-flight against Redis servers that are configured in every way that matters."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from redis.crc import key_slot
from redis.exceptions import RedisError

from config import load
from services.broker import preflight
from services.broker.keys import UNACKED
from tests.support.harness import Harness, Node, Stack
from tests.support.ports import free_port
from tests.support.processes import children
from tests.support.redis.server import RedisServer, disguise
from tests.support.redis.urls import MASTER, issue_certificates, start_sentinel
from tests.support.waiting import TIMEOUT_SECONDS

pytestmark = pytest.mark.each_redis

ACCEPTED, REFUSED = 0, 3
VOLATILE = ("appendonly no",)
EVICTING = ("maxmemory-policy allkeys-lru",)
EVICTS = "throws away waiting tasks"
Check = Callable[..., str]


@pytest.fixture
def check(harness: Harness, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run the check that worker and beat make before they start; its output, once it ends with this code at once."""
    monkeypatch.setattr(preflight, "sleep", lambda _: pytest.fail(capsys.readouterr().err))

    def run(redis: RedisServer, expected: int = REFUSED, **settings: str) -> str:
        environment = harness.stack(redis, **settings).environment()
        code = ACCEPTED
        try:
            preflight.check(load(environment))
        except SystemExit as exit:
            code = int(str(exit.code))
        output = capsys.readouterr().err
        assert code == expected, output
        return output

    return run


# What a redis.conf has, and what is said of it beside the command that mends it.
MENDED = {
    "allkeys-lru": (EVICTING, REFUSED, ["its maxmemory-policy is allkeys-lru", EVICTS]),
    "volatile-ttl": (["maxmemory-policy volatile-ttl"], REFUSED, ["its maxmemory-policy is volatile-ttl", EVICTS]),
    "volatile": (VOLATILE, REFUSED, ["it keeps nothing on disk", "BROKER_ALLOW_VOLATILE=1"]),
    "timeout": (["timeout 30"], ACCEPTED, ["warning", "idle for 30 s"]),
}


@pytest.mark.parametrize("case", MENDED)
def test_an_unsafe_setting_is_named_with_the_command_that_mends_it(harness: Harness, check: Check, case: str) -> None:
    lines, expected, phrases = MENDED[case]
    redis = harness.redis(lines=lines)

    output = check(redis, expected)

    for phrase in (f"CELERY_BROKER_URL (redis://:***@127.0.0.1:{redis.port}/0): it", *phrases):
        assert phrase in output
    command = re.search(r"'redis-cli ([^']+)'", output)
    assert command, output
    redis.ask(*command[1].split())
    assert not check(redis, ACCEPTED)


def test_a_redis_that_keeps_nothing_is_accepted_when_losing_tasks_is_meant(harness: Harness, check: Check) -> None:
    output = check(harness.redis(lines=VOLATILE), ACCEPTED, BROKER_ALLOW_VOLATILE="1")

    assert output.startswith("preflight: warning: CELERY_BROKER_URL")
    assert "it keeps nothing on disk" in output


WRONG_LOGIN = "Redis knows no such user or the password is wrong"


@pytest.mark.parametrize(("given", "reason"), [("guessed", WRONG_LOGIN), ("", "Redis wants a password and got none")])
def test_a_wrong_password_is_refused_in_words(harness: Harness, check: Check, given: str, reason: str) -> None:
    output = check(harness.redis(), REDIS_PASSWORD=given)

    assert output.count(reason) == 1
    assert "REDIS_PASSWORD" in output
    assert "waiting" not in output
    assert not given or given not in output


def test_a_password_that_redis_does_not_want_does_no_harm(harness: Harness, check: Check) -> None:
    assert not check(harness.redis(""), ACCEPTED, REDIS_PASSWORD="needless")


# What a managed Redis allows: CONFIG is its operator's.
MANAGED = "user managed on >secret ~* &* +@all -config"
# And one that keeps INFO to itself as well.
CLOSED = "user managed on >secret ~* &* +@all -config -info"
UNCHECKED = "not everything could be checked"
MAY_NOT_RUN_SCRIPTS = "its user may not do what Stalk's scripts do"
# What a redis.conf has, with this user in it, and what is said of it to that user; None: to the default user.
RIGHTS: dict[str, tuple[Iterable[str], str | None, int, list[str]]] = {
    "unknown user": ([], "", REFUSED, [WRONG_LOGIN]),
    "snapshots alone": (
        [*VOLATILE, "save 3600 1"],
        None,
        ACCEPTED,
        ["warning", "what was sent since its last snapshot is lost"],
    ),
    "without CONFIG": ([], MANAGED, ACCEPTED, [UNCHECKED, "CONFIG GET timeout"]),
    "evicts, without CONFIG": (EVICTING, MANAGED, REFUSED, ["its maxmemory-policy is allkeys-lru"]),
    "keeps nothing, without CONFIG": (
        VOLATILE,
        MANAGED,
        ACCEPTED,
        ["its append-only file is off, and whether it writes snapshots cannot be read"],
    ),
    "without INFO": (
        [],
        CLOSED,
        ACCEPTED,
        ["INFO", "CONFIG GET maxmemory-policy", "CONFIG GET save", "CONFIG GET timeout"],
    ),
    "no EVAL": ([], "user managed on >secret &* ~* +@all -eval", REFUSED, [MAY_NOT_RUN_SCRIPTS]),
    "no EVALSHA": ([], "user managed on >secret &* ~* +@all -evalsha", REFUSED, [MAY_NOT_RUN_SCRIPTS]),
    # Beat needs fewer keys than a worker.
    "not all keys": ([], f"user managed on >secret &* ~{UNACKED}* +@all", ACCEPTED, [UNCHECKED]),
    "no scripts at all": (['rename-command EVAL ""'], None, REFUSED, ["allow it EVAL"]),
}


def as_managed(redis: RedisServer) -> Mapping[str, str]:
    return {"CELERY_BROKER_URL": redis.url(user="managed", password="secret")}


@pytest.mark.parametrize("case", RIGHTS)
def test_a_redis_is_checked_as_far_as_its_user_may_look(harness: Harness, check: Check, case: str) -> None:
    lines, user, expected, phrases = RIGHTS[case]
    redis = harness.redis(lines=[*lines, *([user] if user else [])])

    output = check(redis, expected, **({} if user is None else as_managed(redis)))

    for phrase in phrases:
        assert phrase in output
    assert "secret" not in output
    # INFO has the policy as well.
    assert ("CONFIG GET maxmemory-policy" in output) is (case == "without INFO")
    if case == "not all keys":
        assert re.search(r"refused were .*EVAL: .*\bkeys?\b", output)


def test_a_replica_is_refused(harness: Harness, check: Check) -> None:
    # By default it waits 5 s for more replicas before it sends its first copy.
    master = harness.redis("", lines=["repl-diskless-sync-delay 0"])
    replica = harness.redis("", lines=[f"replicaof 127.0.0.1 {master.port}"])
    # While it loads that, it answers nobody, and a worker would wait.
    linked = replica.client()
    harness.wait_until(
        lambda: linked.info("replication")["master_link_status"] == "up", TIMEOUT_SECONDS, "it has its copy"
    )

    assert "it is a replica" in check(replica)


def test_a_version_that_is_too_old_is_refused(harness: Harness, check: Check) -> None:
    program, version = disguise(harness.directory / "redis-server")

    assert f"it is version {version}, and 6.2 or newer is needed" in check(harness.redis(program=program))


# What a user needs who keeps nothing but results.
RESULTS_ONLY = "~celery-task-meta-* ~celery-taskset-meta-*"
SLOTS = range(16384)


def start_cluster(harness: Harness, slots: Iterable[object], *users: str) -> RedisServer:
    """A cluster of one server; without all slots it is one that is down."""
    redis = harness.redis(lines=["cluster-enabled yes", "cluster-require-full-coverage no", *users])
    if slots:
        redis.ask("CLUSTER", "ADDSLOTS", *map(str, slots))
        harness.wait_until(lambda: "cluster_state:ok" in ask(redis, "CLUSTER", "INFO"), TIMEOUT_SECONDS, "it is up")
    return redis


@pytest.mark.parametrize("slots", [(), SLOTS], ids=["without-slots", "with-slots"])
# The last one's is known by what it says of scripts.
@pytest.mark.parametrize("may", ["+@all", "+@all -info -cluster", "+@all -config -info -exists"])
@pytest.mark.parametrize("database", [0, 1])
def test_a_cluster_is_refused(harness: Harness, check: Check, slots: Iterable[int], may: str, database: int) -> None:
    redis = start_cluster(harness, slots, f"user managed on >secret ~* &* {may}")
    url = redis.url(database, user="managed", password="secret")

    output = check(redis, CELERY_BROKER_URL=url, CELERY_RESULT_BACKEND=url)

    assert "it is a Redis Cluster" in output
    assert "waiting" not in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(("user", "database"), [("", 1), ("managed", 0)])
def test_a_cluster_is_refused_for_results_too(harness: Harness, check: Check, user: str, database: int) -> None:
    results = start_cluster(harness, (), f"user managed on >secret {RESULTS_ONLY} &* +@all -info")
    url = results.url(database, user=user, password="secret" if user else None)

    output = check(harness.redis(), CELERY_RESULT_BACKEND=url)

    assert "CELERY_RESULT_BACKEND" in output
    assert "it is a Redis Cluster" in output


def test_a_server_like_dragonfly_is_refused(harness: Harness, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dragonfly's own words cannot be had here; a cluster that has the declared keys alone refuses the same.
    monkeypatch.setattr(preflight, "UNACKED_KEYS", [UNACKED])
    redis = start_cluster(harness, [key_slot(UNACKED.encode())], f"{CLOSED} -exists")

    output = check(redis, **as_managed(redis))

    assert re.search(r"its scripts may touch only keys that they were told of \(.*cript attempted to access", output)
    assert "Dragonfly" in output


def test_results_need_no_scripts_and_no_keys_but_their_own(harness: Harness, check: Check) -> None:
    results = harness.redis(lines=[f"user managed on >secret {RESULTS_ONLY} &* +@all -eval -evalsha"])
    url = results.url(1, user="managed", password="secret")

    assert not check(harness.redis(), ACCEPTED, CELERY_RESULT_BACKEND=url)


@pytest.fixture(scope="module")
def certificates(shared_harness: Harness) -> Path:
    return issue_certificates(shared_harness)


def by_sentinel(url: str) -> dict[str, str]:
    return {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "CELERY_SENTINEL_MASTER": MASTER}


@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
@pytest.mark.parametrize("foreign", ["server", "name", "authority"])
def test_a_certificate_that_is_not_accepted_is_refused_in_words(
    harness: Harness, check: Check, certificates: Path, scheme: str, foreign: str
) -> None:
    shown = issue_certificates(harness, "DNS:redis.example.com") if foreign == "name" else certificates
    trusted = issue_certificates(harness) if foreign == "server" else shown
    options = "ssl_cert_reqs=required" if foreign == "authority" else f"ssl_ca_certs={trusted / 'ca.crt'}"
    redis = harness.redis("", certificates=shown)
    port = redis.port if scheme == "rediss" else start_sentinel(harness, redis).port
    url = f"{scheme}://localhost:{port}/0?{options}"

    output = check(redis, **by_sentinel(url))

    assert "its certificate is not accepted (certificate verify failed: " in output
    assert "ssl_ca_certs of CELERY_BROKER_URL" in output
    assert len(output.splitlines()) == 1


def test_a_master_whose_certificate_is_for_another_address_is_refused_in_words(harness: Harness, check: Check) -> None:
    # The sentinel is asked for by its name, and names its master by an address.
    certificates = issue_certificates(harness, "DNS:localhost")
    redis = harness.redis("", certificates=certificates)
    url = f"sentinel://localhost:{start_sentinel(harness, redis).port}/0?ssl_ca_certs={certificates / 'ca.crt'}"
    output = check(redis, **by_sentinel(url))

    assert "its certificate is not accepted (certificate verify failed: IP address mismatch" in output
    assert not check(redis, ACCEPTED, **by_sentinel(f"{url}&ssl_check_hostname=false"))


def test_results_on_the_brokers_server_are_checked_where_tls_differs(
    harness: Harness, check: Check, certificates: Path
) -> None:
    redis = harness.redis("", certificates=certificates)

    output = check(redis, CELERY_RESULT_BACKEND=f"rediss://localhost:{redis.port}/1")

    assert output.startswith("preflight: error: CELERY_RESULT_BACKEND")


def test_a_version_of_tls_that_redis_does_not_speak_is_refused(
    harness: Harness, check: Check, certificates: Path
) -> None:
    redis = harness.redis("", certificates=certificates, lines=["tls-protocols TLSv1.2"])

    output = check(redis, CELERY_BROKER_URL=f"{redis.url()}&ssl_min_version=TLSv1.3")

    assert "it speaks no TLS, or not as asked to (" in output
    assert "ssl_ options in CELERY_BROKER_URL" in output


@pytest.mark.parametrize("given", ["", "guessed"])
def test_a_wrong_password_of_sentinels_is_refused_in_words(harness: Harness, check: Check, given: str) -> None:
    redis = harness.redis("")
    settings = by_sentinel(f"sentinel://127.0.0.1:{start_sentinel(harness, redis, 'secret').port}/0")

    output = check(redis, **settings, CELERY_SENTINEL_PASSWORD=given)

    assert "correct CELERY_SENTINEL_PASSWORD" in output
    assert "waiting" not in output
    assert not check(redis, ACCEPTED, **settings, CELERY_SENTINEL_PASSWORD="secret")


def test_sentinels_that_name_no_master_are_waited_for_in_one_line(harness: Harness) -> None:
    redis = harness.redis("")
    sentinel = start_sentinel(harness, redis, name="another")
    gone = free_port()
    url = f"sentinel://127.0.0.1:{sentinel.port}/0;sentinel://127.0.0.1:{gone}/0"
    beat = (
        harness.stack(redis, **by_sentinel(url))
        .beat()
        .says(
            rf"waiting for CELERY_BROKER_URL \(.*\): no sentinel names a master the-master \(127.0.0.1:{sentinel.port} "
            rf"knows none that is up; 127.0.0.1:{gone}: .*refused"
        )
    )

    sentinel.ask("SENTINEL", "MONITOR", "the-master", "127.0.0.1", str(redis.port), "1")

    beat.says("beat: ticking")


def test_a_server_of_its_own_for_results_may_forget_them_but_not_evict(harness: Harness, check: Check) -> None:
    volatile, evicting = (harness.redis(lines=lines).url(1) for lines in (VOLATILE, EVICTING))

    assert "CELERY_RESULT_BACKEND" in check(harness.redis(), ACCEPTED, CELERY_RESULT_BACKEND=volatile)
    output = check(harness.redis(), CELERY_RESULT_BACKEND=evicting)
    assert "CELERY_RESULT_BACKEND" in output
    assert "CELERY_BROKER_URL" not in output


@pytest.mark.parametrize("role", [Stack.worker, Stack.beat])
def test_worker_and_beat_exit_with_3_before_anything_starts(harness: Harness, role: Callable[[Stack], Node]) -> None:
    process = role(harness.stack(harness.redis(lines=EVICTING)))

    assert process.exits(TIMEOUT_SECONDS) == REFUSED
    assert process.process.log().startswith("preflight: error: ")
    assert len(process.process.log().splitlines()) == 1


def ask(redis: RedisServer, *command: str) -> str:
    """The answer of Redis, or why there is none."""
    try:
        return str(redis.ask(*command))
    except RedisError as error:
        return str(error)


def break_disk(redis: RedisServer) -> None:
    # A file cannot take the place of a directory.
    (redis.directory / "dump.rdb").mkdir()
    redis.ask("BGSAVE")


def mend_disk(redis: RedisServer) -> None:
    (redis.directory / "dump.rdb").rmdir()
    redis.ask("SAVE")


def keep_busy(redis: RedisServer) -> None:
    threading.Thread(target=ask, args=[redis, "EVAL", "while true do end", "0"]).start()


# What Redis says then, how to bring it about and how to end it.
WAITED_FOR: dict[str, tuple[Callable[[RedisServer], object], Callable[[RedisServer], object]]] = {
    "refused": (RedisServer.stop, RedisServer.start),
    "MISCONF": (break_disk, mend_disk),
    "BUSY": (keep_busy, lambda redis: redis.ask("SCRIPT", "KILL")),
}


@pytest.mark.parametrize("reason", WAITED_FOR)
def test_a_redis_that_does_not_answer_or_write_or_is_busy_is_waited_for(harness: Harness, reason: str) -> None:
    bring_about, end = WAITED_FOR[reason]
    redis = harness.redis(lines=["save 3600 1", "lua-time-limit 1"])
    bring_about(redis)
    harness.wait_until(lambda: reason in ask(redis, "PING"), TIMEOUT_SECONDS, "Redis refuses")
    name = rf"CELERY_BROKER_URL \(redis://:\*\*\*@127.0.0.1:{redis.port}/0\)"
    beat = harness.stack(redis).beat().says(rf"preflight: waiting for {name}: .*{reason}")

    end(redis)

    beat.says(rf"preflight: goes on after [\d.]+ s of waiting for {name}").says("beat: ticking")
    assert beat.process.count("preflight: waiting") == 1


def test_waiting_for_redis_ends_when_told_as_process_1_of_a_container(harness: Harness) -> None:
    redis = harness.redis()
    redis.stop()
    stack = harness.stack(redis)
    command = ["unshare", "--pid", "--fork", sys.executable, "-m", "services.launch", "worker"]
    process = harness.process("worker", command, stack.environment())
    harness.wait_until(
        lambda: not process.alive or process.count("waiting for"), TIMEOUT_SECONDS, "it waits, or may not run"
    )
    if not process.alive and "unshare" in process.log():
        pytest.skip("no process namespace can be made by this user")

    os.kill(children(process.pid)[0], signal.SIGTERM)

    harness.wait_until(lambda: not process.alive, TIMEOUT_SECONDS, "it leaves")
    assert process.code == 0
