"""config.celery: Settings → Celery's own setting names."""

import pytest
from celery.app.defaults import SETTING_KEYS

from config import load
from config.celery import build_celery_configuration, build_sentinel_options
from services.delivery.channel import Channel

SENTINEL = {
    "CELERY_BROKER_URL": "sentinel://:master@s1/0;sentinel://:master@s2/0",
    "CELERY_RESULT_BACKEND": "sentinel://:master@s1/1",
    "CELERY_SENTINEL_MASTER": "main",
}


@pytest.mark.parametrize("environment", [{}, SENTINEL])
def test_every_name_is_one_that_celery_reads(environment: dict[str, str]) -> None:
    # The Redis backend reads it, and Celery's list has it not (celery 5.7).
    unlisted = {"redis_backend_health_check_interval"}
    assert build_celery_configuration(load(environment)).keys() - SETTING_KEYS - unlisted == set()


def test_every_transport_option_is_one_that_kombu_reads() -> None:
    options = build_celery_configuration(load({}))["broker_transport_options"]
    assert options.keys() - set(Channel.from_transport_options) == set()


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("CELERY_RESULT_EXPIRES", "60", "result_expires", 60),
        ("CELERY_TIMEZONE", "Europe/Berlin", "timezone", "Europe/Berlin"),
        ("REDIS_PASSWORD", "p/w", "broker_url", "redis://:p%2Fw@redis:6379/0"),
        ("REDIS_PASSWORD", "p/w", "result_backend", "redis://:p%2Fw@redis:6379/1"),
        ("WORKER_PREFETCH_MULTIPLIER", "4", "worker_prefetch_multiplier", 4),
        ("CELERY_BROKER_URL", "redis://redis:6379/7", "broker_url", "redis://redis:6379/7"),
        ("CELERY_RESULT_BACKEND", "redis://redis:6379/8", "result_backend", "redis://redis:6379/8"),
    ],
)
def test_a_setting_reaches_celery(variable: str, text: str, name: str, value: object) -> None:
    assert build_celery_configuration(load({variable: text}))[name] == value
    assert build_celery_configuration(load({}))[name] != value


def test_what_delivery_relies_on_is_configured() -> None:
    configuration = build_celery_configuration(load({"CELERY_VISIBILITY_TIMEOUT": "7200"}))
    # A task is acknowledged after it ran, and messages are JSON and nothing else.
    expected = {"task_acks_late": True, "task_reject_on_worker_lost": True, "accept_content": ["json"]}
    expected |= {f"{kind}_serializer": "json" for kind in ("task", "result", "event")}
    assert configuration.items() >= expected.items()
    # Two stacks on one server do not hear each other.
    options = {"visibility_timeout": 7200, "fanout_prefix": True, "fanout_patterns": True}
    assert configuration["broker_transport_options"].items() >= options.items()


def test_sentinels_and_nobody_else_are_asked_for_the_master_with_their_own_password() -> None:
    settings = load(SENTINEL | {"CELERY_SENTINEL_PASSWORD": "watcher"})
    configuration = build_celery_configuration(settings)
    for name in ("broker_transport_options", "result_backend_transport_options"):
        assert configuration[name]["master_name"] == "main"
        assert configuration[name]["sentinel_kwargs"]["password"] == "watcher"
    # An empty password would be sent, and refused.
    assert "password" not in build_sentinel_options(load(SENTINEL), load(SENTINEL).broker_url)
    assert "master_name" not in build_celery_configuration(load({}))["broker_transport_options"]
