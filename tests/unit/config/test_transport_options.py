"""Transport options that nothing in Stalk reads: refused by their names, however an application is given them."""

import pytest
from kombu.transport import redis as kombu_redis

from config import load
from config.celery import build_celery_configuration
from services.delivery.channel import SentinelChannel
from services.delivery.connection import Connection, UnreadOptions
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.unit.refusals import run_refused

URL = "redis://127.0.0.1:1/0"
SETTINGS = {"CELERY_BROKER_URL": URL, "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/1"}
SENTINEL = SETTINGS | {"CELERY_BROKER_URL": "sentinel://127.0.0.1:1/0", "CELERY_SENTINEL_MASTER": "main"}
# Of kombu's own.
IGNORED = {
    *("ack_emulation", "global_keyprefix", "priority_steps", "queue_order_strategy", "sep"),
    *("unacked_index_key", "unacked_key", "unacked_mutex_expire", "unacked_mutex_key"),
    *("unacked_restore_interval", "unacked_restore_limit", "unacked_restore_throttle"),
}
# Not in kombu's list, but read by its transport.
UNLISTED = {"polling_interval", "reauth_check_interval", "retry", "retry_on_error"}


def refuse(url: str, **options: object) -> str:
    """The sentence with which a connection with these options is refused."""
    with pytest.raises(UnreadOptions) as refused:
        Connection(url, transport_options=options)
    return str(refused.value)


def test_each_option_of_kombu_is_honoured_or_refused() -> None:
    offered = set(kombu_redis.SentinelChannel.from_transport_options)
    assert offered - set(SentinelChannel.from_transport_options) == IGNORED


@pytest.mark.parametrize("name", sorted(IGNORED | UNLISTED))
@pytest.mark.parametrize("url", [URL, "rediss://127.0.0.1:1/0", "redis+socket:///redis.sock", "sentinel://127.0.0.1:1"])
def test_an_option_that_nothing_reads_is_refused_by_name(url: str, name: str) -> None:
    for value in (None, 1):
        sentence = refuse(url, **{name: value})
        assert sentence.startswith(f"broker_transport_options: Stalk does not read {name}")
        assert sentence.endswith(": take it out")


def test_the_sentence_names_all_of_them_and_what_to_do_in_their_place() -> None:
    assert refuse(URL, global_keyprefix="shop:", visiblity_timeout=60, lease=60, region="eu") == (
        "broker_transport_options: Stalk does not read global_keyprefix (give each application a Redis database of its "
        "own), region, visiblity_timeout (did you mean visibility_timeout?): take them out"
    )


def test_an_option_for_sentinels_is_refused_without_them() -> None:
    assert "does not read master_name: take it out" in refuse(URL, master_name="main")


@pytest.mark.parametrize("settings", [SETTINGS, SENTINEL, {**SETTINGS, "CELERY_SENTINEL_MASTER": "main"}])
def test_what_stalk_sets_is_read(settings: dict[str, str]) -> None:
    configured = build_celery_configuration(load(settings))
    assert Connection(configured["broker_url"], transport_options=configured["broker_transport_options"])


def test_options_of_kombus_connection_are_read_with_any_transport() -> None:
    assert Connection(URL, transport_options={"max_retries": 3, "interval_start": 0.1, "connect_retries_timeout": 5})
    assert Connection("memory://", transport_options={"polling_interval": 0.1})


def test_a_producer_is_refused_before_it_connects() -> None:
    app = create_app(load(SETTINGS))
    app.conf.broker_transport_options["global_keyprefix"] = "shop:"
    with pytest.raises(UnreadOptions, match="does not read global_keyprefix"):
        app.send_task("any", retry=False)


@pytest.mark.parametrize(
    "command",
    ["-m celery -A services.app worker", "-m celery -A services.app beat", "-m services.commands.check"],
)
def test_a_module_of_tasks_that_sets_one_is_told_in_one_sentence(own_checkout: Checkout, command: str) -> None:
    own_checkout.write(
        "services/tasks/own.py",
        "from celery import current_app\ncurrent_app.conf.broker_transport_options['unacked_key'] = 'shop'\n",
    )
    *_, sentence = run_refused(own_checkout, *command.split(), STALK_RUN_DIR=str(own_checkout.path), **SETTINGS)
    assert sentence.endswith("broker_transport_options: Stalk does not read unacked_key: take it out")
