"""An application outside the stack whose URLs nobody has set: it says which to export, and looks for no Redis."""

from __future__ import annotations

import pytest

from config import load
from services.broker.client import UrlNotSetError, connect
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.unit.refusals import run_refused

BROKER, RESULTS = "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"
URL = "redis://127.0.0.1:1/0"
SENTENCE = f"{BROKER} and {RESULTS} must be exported, because nobody outside the stack's containers"


def test_a_publish_names_the_variables() -> None:
    with pytest.raises(UrlNotSetError, match=SENTENCE):
        create_app(load({})).send_task("any")


def test_a_look_at_a_result_names_the_variables() -> None:
    with pytest.raises(UrlNotSetError, match=f"^{RESULTS} must be exported"):
        _ = create_app(load({BROKER: URL})).AsyncResult("any").state


def test_a_task_whose_result_is_awaited_is_not_sent_where_no_result_can_be_read() -> None:
    app = create_app(load({BROKER: URL}))
    with pytest.raises(UrlNotSetError, match=f"^{RESULTS} must be exported"):
        app.send_task("any", retry=False)


def test_a_client_of_our_own_names_the_variables() -> None:
    settings = load({"REDIS_PASSWORD": "secret"})
    for url in (settings.broker_url, settings.result_url):
        with pytest.raises(UrlNotSetError, match="REDIS_PASSWORD, where the URL has no password"):
            connect(url, settings)


@pytest.mark.parametrize(
    ("settings", "configured"),
    [
        ({"STALK_RUN_DIR": "/run/stalk"}, {}),
        ({BROKER: "redis://redis:6379/0", RESULTS: "redis://redis:6379/1"}, {}),
        ({BROKER: URL, RESULTS: URL}, {}),
        ({}, {"broker_url": URL, "result_backend": URL}),
    ],
    ids=["inside the stack", "the default, set", "another URL", "configured by hand"],
)
def test_a_url_that_is_set_or_known_to_be_right_is_used(settings: dict[str, str], configured: dict[str, str]) -> None:
    app = create_app(load(settings))
    app.conf.update(configured)
    assert app.connection_for_write().as_uri()
    assert app.backend.client


@pytest.mark.parametrize("command", ["celery -A services.app worker", "celery -A services.app beat", "services status"])
def test_a_command_by_hand_is_one_sentence_and_exit_code_2(checkout: Checkout, command: str) -> None:
    (sentence,) = run_refused(checkout, "-m", *command.split())
    assert SENTENCE in sentence
