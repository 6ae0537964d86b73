"""Every form of Redis URL, with a password of awkward characters; and two stacks on one server."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from tests.integration.commands.test_call import services
from tests.support.redis.server import RedisServer, make_certificates, require_tls
from tests.support.world import Node, Stack, World

PATIENCE = 120
AWKWARD = "p@$$:/#%'\" é"
SENTINEL_PASSWORD = "s:3/cr#t é"
MASTER = "the-master"
# As in a shell, or in somebody's web application.
SAVING = """
from redbeat import RedBeatSchedulerEntry
from services.app import app
RedBeatSchedulerEntry("saved", "services.tasks.arithmetic.add", 1, args=[2, 3], app=app).save()
"""
FORMS = ("redis", "redis+socket", "sentinel", "rediss", "sentinel with TLS")


def quoted(text: str) -> str:
    """A text as redis.conf takes any: each byte by its number."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def served(world: World, form: str) -> tuple[RedisServer, dict[str, str]]:
    """A server that is reached by this form of URL, and the settings that name it."""
    if form in ("rediss", "sentinel with TLS"):
        require_tls(world.directory)
        redis = world.redis(AWKWARD, certificates=make_certificates(world.path("certificates")))
    else:
        redis = world.redis(AWKWARD)
    settings = {"REDIS_PASSWORD": AWKWARD}
    # The password in the broker's URL, and from REDIS_PASSWORD for the results'.
    urls = [redis.url(0), redis.url(1, password="")]
    if form == "redis+socket":
        urls = [redis.socket_url(database) for database in (0, 1)]
    if form.startswith("sentinel"):
        port = start_sentinel(world, redis, SENTINEL_PASSWORD).port
        options = f"?ssl_ca_certs={redis.certificates / 'ca.crt'}" if redis.certificates else ""
        urls = [f"sentinel://127.0.0.1:{port}/{database}{options}" for database in (0, 1)]
        settings |= {"CELERY_SENTINEL_MASTER": MASTER, "CELERY_SENTINEL_PASSWORD": SENTINEL_PASSWORD}
    return redis, settings | dict(zip(("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"), urls, strict=True))


def start_sentinel(
    world: World, master: RedisServer, password: str = "", *lines: str, name: str = MASTER
) -> RedisServer:
    """A sentinel for this master."""
    lines = (*lines, f"sentinel monitor {name} 127.0.0.1 {master.port} 1")
    if password:
        lines = (f"requirepass {quoted(password)}", *lines)
    if master.password:
        lines = (*lines, f"sentinel auth-pass {name} {quoted(master.password)}")
    return world.redis(password, lines, sentinel=True, certificates=master.certificates)


@pytest.mark.parametrize("form", FORMS)
def test_worker_results_and_beat_work_with_every_form_of_url(world: World, form: str) -> None:
    redis, settings = served(world, form)
    stack = world.stack(redis, **settings, BEAT_SCHEDULE="report-free-space=1")
    worker = stack.worker(WORKER_POOL="solo", LOG_LEVEL="debug")
    beat = stack.beat(LOG_LEVEL="debug")
    worker.ready()

    assert stack.send("services.tasks.arithmetic.add", 4, 3).get(timeout=PATIENCE) == 7
    worker.says(r"Task services.tasks.disk.report_free_space\S+ succeeded", PATIENCE)
    assert redis.client(1).keys("celery-task-meta-*")
    saved = world.answer(["-c", SAVING], stack.environment(), PATIENCE)
    assert saved.returncode == 0, saved.stderr
    worker.says(r"Task services.tasks.arithmetic.add\S+ succeeded", PATIENCE, times=2)
    for node in (worker, beat):
        assert_tells_no_secret(node)


def assert_tells_no_secret(node: Node) -> None:
    log = node.process.log()
    for secret in (AWKWARD, SENTINEL_PASSWORD):
        forms = [secret, repr(secret)[1:-1], quote(secret, safe="")]
        assert not [form for form in forms if form in log]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_stack_works_with_the_lowest_version_and_the_names_that_its_sentinels_url_asks_for(
    world: World, pool: str
) -> None:
    redis, settings = served(world, "sentinel with TLS")
    for variable in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        settings[variable] += "&ssl_check_hostname=true&ssl_min_version=TLSv1.3"
    stack = world.stack(redis, **settings, BEAT_SCHEDULE="report-free-space=1")
    worker, beat = stack.worker(WORKER_POOL=pool, LOG_LEVEL="debug"), stack.beat()
    worker.ready()

    # A process of Stalk's own: kombu alone does not read the version (kombu 5.7).
    assert services(stack, "call", "services.tasks.arithmetic.add", "--args", "[4, 3]").said["result"] == 7
    worker.says(r"Task services.tasks.disk.report_free_space\S+ succeeded", PATIENCE)
    world.wait_until(lambda: services(stack, "status").said["nodes"], PATIENCE, "the node in the status")
    for node in (worker, beat):
        assert_tells_no_secret(node)


def test_two_stacks_on_one_server_do_not_hear_each_other(world: World) -> None:
    redis = world.redis()
    ours, theirs = (stack_on(world, redis, database) for database in (0, 2))
    workers = [stack.celery("worker --pool=solo --hostname=node0@%h --loglevel=debug") for stack in (ours, theirs)]
    for worker in workers:
        worker.ready()
    for stack in (ours, theirs):
        # A worker hears what is broadcast a moment after it has said that it is ready.
        assert stack.send("services.tasks.arithmetic.add", 4, 3).get(timeout=PATIENCE) == 7

    for stack in (ours, theirs):
        assert len(stack.client.control.ping(timeout=PATIENCE, limit=1)) == 1
    # A stop that is meant for one stack would end the other too.
    ours.client.control.shutdown()

    assert workers[0].exits(PATIENCE) == 0
    assert len(theirs.client.control.ping(timeout=PATIENCE, limit=1)) == 1
    # Each has heard its own stack's, and no more.
    assert [worker.process.count("pidbox received method ping") for worker in workers] == [1, 2]
    assert workers[1].process.alive


def stack_on(world: World, redis: RedisServer, database: int) -> Stack:
    """A stack with its broker in this database and its results in the next."""
    return world.stack(
        redis,
        CELERY_BROKER_URL=redis.url(database, password=""),
        CELERY_RESULT_BACKEND=redis.url(database + 1, password=""),
    )
