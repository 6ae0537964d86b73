"""Options of TLS in a URL mean the same to all that connect: to a Redis, to sentinels, and to the master they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

from config import Settings, load
from services.broker.client import connect
from tests.integration.broker.test_urls import MASTER, start_sentinel
from tests.support.application import create_app
from tests.support.redis.server import make_certificates, require_tls
from tests.support.world import World

REFUSALS = (ConnectionError, OperationalError)


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


class Served:
    """A Redis that speaks TLS, and a sentinel that does."""

    def __init__(self, world: World, certificates: Path, *lines: str) -> None:
        self.redis = world.redis("", certificates=certificates, lines=lines)
        self.sentinel = start_sentinel(world, self.redis, "", *lines)

    def settings(self, scheme: str, *options: str) -> Settings:
        port = self.redis.port if scheme == "rediss" else self.sentinel.port
        urls = [f"{scheme}://localhost:{port}/{database}?{'&'.join(options)}" for database in (0, 1)]
        return load({"CELERY_BROKER_URL": urls[0], "CELERY_RESULT_BACKEND": urls[1], "CELERY_SENTINEL_MASTER": MASTER})


@pytest.fixture(scope="module")
def authority(shared_world: World) -> Path:
    require_tls(shared_world.directory)
    return make_certificates(shared_world.path("certificates"))


# What a server does, and with which options a URL gets in beside the authority, and with which it does not.
CASES = {
    "knows nothing newer than TLS 1.2": (
        ["tls-protocols TLSv1.2"],
        [["{trusted}"], ["{trusted}", "ssl_min_version=TLSv1.2"]],
        [["{trusted}", "ssl_min_version=TLSv1.3"]],
    ),
    "shows the certificate of another host": (
        [],
        [["{trusted}", "ssl_check_hostname=false"]],
        [["{trusted}"], ["{trusted}", "ssl_check_hostname=true"]],
    ),
    "has an authority that nobody knows": ([], [["ssl_cert_reqs=none"]], [["ssl_cert_reqs=required"]]),
    "lets in only who shows a certificate": (
        ["tls-auth-clients yes"],
        [["{trusted}", "ssl_certfile={own}.crt", "ssl_keyfile={own}.key"]],
        [["{trusted}"]],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, shared_world: World) -> tuple[Served, list[list[str]], list[list[str]]]:
    """A server, and options with which it is reached and not reached."""
    require_tls(shared_world.directory)
    other = ["DNS:redis.example.com"] if "another host" in request.param else []
    certificates = make_certificates(shared_world.path("certificates"), *other)
    lines, right, wrong = CASES[request.param]
    paths = {"trusted": f"ssl_ca_certs={certificates / 'ca.crt'}", "own": certificates / "server"}
    right, wrong = ([[one.format(**paths) for one in options] for options in each] for each in (right, wrong))
    return Served(shared_world, certificates, *lines), right, wrong


@pytest.mark.parametrize("way", [by_broker, by_results, by_client])
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_a_server_is_reached_with_the_options_for_it_and_with_no_others(
    case: tuple[Served, list[list[str]], list[list[str]]], scheme: str, way: Callable[[Settings], None]
) -> None:
    server, right, wrong = case
    for options in right:
        way(server.settings(scheme, *options))
    for options in wrong:
        with pytest.raises(REFUSALS):
            way(server.settings(scheme, *options))
