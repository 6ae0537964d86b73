"""Every form of Redis URL, with a password of awkward characters, and its options of TLS."""

from collections.abc import Callable
from urllib.parse import quote

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

from config import Settings, load
from services.broker.client import connect
from tests.integration.commands.test_call import services
from tests.support.application import create_app
from tests.support.harness import Harness, Node
from tests.support.redis.urls import (
    AWKWARD,
    FORMS,
    MASTER,
    MORE,
    SENTINEL_PASSWORD,
    issue_certificates,
    start_sentinel,
    start_server,
)
from tests.support.waiting import TIMEOUT_SECONDS

# As in a shell, or in somebody's web application.
SAVING = """
from redbeat import RedBeatSchedulerEntry
from services.app import app
RedBeatSchedulerEntry("saved", "services.tasks.arithmetic.add", 1, args=[2, 3], app=app).save()
"""


@pytest.mark.parametrize(
    ("form", "pool", "options"),
    [*((form, "solo", "") for form in FORMS), *((FORMS[-1], pool, MORE) for pool in ("prefork", "threads"))],
)
def test_a_stack_works_with_every_form_of_url(harness: Harness, form: str, pool: str, options: str) -> None:
    redis, settings = start_server(harness, form, options=options)
    stack = harness.stack(redis, **settings, BEAT_SCHEDULE="report-free-space=1")
    worker = stack.worker(WORKER_POOL=pool, LOG_LEVEL="debug")
    beat = stack.beat(LOG_LEVEL="debug")
    worker.ready()

    assert services(stack, "call", "services.tasks.arithmetic.add", "--args", "[4, 3]").data["result"] == 7
    worker.says(r"Task services.tasks.disk.report_free_space\S+ succeeded")
    assert redis.client(1).keys("celery-task-meta-*")
    saved = harness.answer(["-c", SAVING], stack.environment(), TIMEOUT_SECONDS)
    assert saved.returncode == 0, saved.stderr
    worker.says(r"Task services.tasks.arithmetic.add\S+ succeeded", times=2)
    harness.wait_until(lambda: services(stack, "status").data["nodes"], TIMEOUT_SECONDS, "the node in the status")
    for node in (worker, beat):
        assert_tells_no_secret(node)


def assert_tells_no_secret(node: Node) -> None:
    log = node.process.log()
    for secret in (AWKWARD, SENTINEL_PASSWORD):
        forms = [secret, repr(secret)[1:-1], quote(secret, safe="")]
        assert not [form for form in forms if form in log]


def by_broker(settings: Settings) -> None:
    with app_of(settings).connection_for_write() as connection:
        connection.channel()


def by_results(settings: Settings) -> None:
    app_of(settings).backend.client.ping()


def app_of(settings: Settings) -> Celery:
    app = create_app(settings)
    for options in (app.conf.broker_transport_options, app.conf.result_backend_transport_options):
        # By itself redis-py asks a sentinel eleven times before it gives up (redis-py 8.1).
        if "sentinel_kwargs" in options:
            options["sentinel_kwargs"]["retry"] = Retry(NoBackoff(), 0)
    return app


def by_client(settings: Settings) -> None:
    # Of the broker: beat, Flower, heartbeats, pre-flight and all commands.
    with connect(settings.broker_url, settings) as client:
        client.ping()


# What a server does, and with which options a URL gets in, and with which it does not.
CASES = {
    "knows nothing newer than TLS 1.2": (
        ["tls-protocols TLSv1.2"],
        ["{trusted}", "{trusted}&ssl_min_version=TLSv1.2"],
        ["{trusted}&ssl_min_version=TLSv1.3"],
    ),
    "shows the certificate of another host": (
        [],
        ["{trusted}&ssl_check_hostname=false"],
        ["{trusted}", "{trusted}&ssl_check_hostname=true"],
    ),
    "has an authority that nobody knows": ([], ["ssl_cert_reqs=none"], ["ssl_cert_reqs=required"]),
    "lets in only who shows a certificate": (
        ["tls-auth-clients yes"],
        ["{trusted}&ssl_certfile={own}.crt&ssl_keyfile={own}.key"],
        ["{trusted}"],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, shared_harness: Harness) -> tuple[dict[str, int], list[str], list[str]]:
    """Ports of a Redis that speaks TLS and of its sentinel; options with which they are reached and not reached."""
    other = ["DNS:redis.example.com"] if "another host" in request.param else []
    certificates = issue_certificates(shared_harness, *other)
    lines, right, wrong = CASES[request.param]
    redis = shared_harness.redis("", certificates=certificates, lines=lines)
    ports = {"rediss": redis.port, "sentinel": start_sentinel(shared_harness, redis, "", *lines).port}
    paths = {"trusted": f"ssl_ca_certs={certificates / 'ca.crt'}", "own": certificates / "server"}
    right, wrong = ([options.format(**paths) for options in each] for each in (right, wrong))
    return ports, right, wrong


@pytest.mark.parametrize("way", [by_broker, by_results, by_client])
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_a_server_is_reached_with_the_options_for_it_and_with_no_others(
    case: tuple[dict[str, int], list[str], list[str]], scheme: str, way: Callable[[Settings], None]
) -> None:
    ports, right, wrong = case

    def connect_with(options: str) -> None:
        broker, results = (f"{scheme}://localhost:{ports[scheme]}/{database}?{options}" for database in (0, 1))
        urls = {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": results}
        way(load({**urls, "CELERY_SENTINEL_MASTER": MASTER}))

    for options in right:
        connect_with(options)
    for options in wrong:
        with pytest.raises((ConnectionError, OperationalError)):
            connect_with(options)
