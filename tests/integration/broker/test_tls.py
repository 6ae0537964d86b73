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
from tests.support.application import create_app
from tests.support.redis.server import RedisServer, make_certificates, require_tls
from tests.support.world import World

MASTER = "the-master"
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


WAYS = [by_broker, by_results, by_client]
Way = Callable[[Settings], None]


class Served:
    """A Redis that speaks TLS, and a sentinel that does."""

    def __init__(self, world: World, certificates: Path, *lines: str) -> None:
        self.redis = world.redis("", certificates=certificates, lines=lines)
        watch = f"sentinel monitor {MASTER} 127.0.0.1 {self.redis.port} 1"
        self.sentinel: RedisServer = world.redis("", certificates=certificates, lines=[*lines, watch], sentinel=True)

    def settings(self, scheme: str, *options: str) -> Settings:
        port = self.redis.port if scheme == "rediss" else self.sentinel.port
        urls = [f"{scheme}://localhost:{port}/{database}?{'&'.join(options)}" for database in (0, 1)]
        return load({"CELERY_BROKER_URL": urls[0], "CELERY_RESULT_BACKEND": urls[1], "CELERY_SENTINEL_MASTER": MASTER})


@pytest.fixture(scope="module")
def authority(shared_world: World) -> Path:
    require_tls(shared_world.directory)
    return make_certificates(shared_world.path("certificates"))


@pytest.fixture(scope="module")
def served(shared_world: World, authority: Path) -> Served:
    """What knows no newer version of TLS than 1.2."""
    return Served(shared_world, authority, "tls-protocols TLSv1.2")


@pytest.fixture(scope="module")
def misnamed(shared_world: World, authority: Path) -> tuple[Served, Path]:
    """What shows the certificate of another host; and its authority."""
    certificates = make_certificates(shared_world.path("certificates"), "DNS:redis.example.com")
    return Served(shared_world, certificates), certificates


@pytest.fixture(scope="module")
def demanding(shared_world: World, authority: Path) -> Served:
    """What lets in only who shows a certificate."""
    return Served(shared_world, authority, "tls-auth-clients yes")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_an_old_version_is_spoken_only_where_the_url_allows_it(
    served: Served, authority: Path, scheme: str, way: Way
) -> None:
    trusted = f"ssl_ca_certs={authority / 'ca.crt'}"
    way(served.settings(scheme, trusted))
    way(served.settings(scheme, trusted, "ssl_min_version=TLSv1.2"))
    with pytest.raises(REFUSALS):
        way(served.settings(scheme, trusted, "ssl_min_version=TLSv1.3"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_a_certificate_for_another_name_is_taken_only_where_the_url_allows_it(
    misnamed: tuple[Served, Path], scheme: str, way: Way
) -> None:
    server, certificates = misnamed
    trusted = f"ssl_ca_certs={certificates / 'ca.crt'}"
    way(server.settings(scheme, trusted, "ssl_check_hostname=false"))
    for asked in ([], ["ssl_check_hostname=true"]):
        with pytest.raises(REFUSALS):
            way(server.settings(scheme, trusted, *asked))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_a_certificate_of_an_unknown_authority_is_taken_only_where_the_url_allows_it(
    served: Served, scheme: str, way: Way
) -> None:
    way(served.settings(scheme, "ssl_cert_reqs=none"))
    with pytest.raises(REFUSALS):
        way(served.settings(scheme, "ssl_cert_reqs=required"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["rediss", "sentinel"])
def test_a_server_that_wants_a_certificate_is_shown_the_one_that_the_url_names(
    demanding: Served, authority: Path, scheme: str, way: Way
) -> None:
    trusted = f"ssl_ca_certs={authority / 'ca.crt'}"
    way(demanding.settings(scheme, trusted, *own(authority)))
    with pytest.raises(REFUSALS):
        way(demanding.settings(scheme, trusted))


def own(certificates: Path) -> list[str]:
    return [f"ssl_certfile={certificates / 'server.crt'}", f"ssl_keyfile={certificates / 'server.key'}"]
