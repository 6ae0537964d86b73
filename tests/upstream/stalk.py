"""Stalk in the place of what Celery's and kombu's tests test: a plugin of the pytest that runs them."""

import os
from copy import deepcopy
from functools import partial
from typing import Any

import kombu
from celery.contrib.testing import app as testing_app
from celery.contrib.testing import tasks as ping  # noqa: F401 - the task by which they know that a worker is there
from celery.contrib.testing import worker as testing_worker

from config import load
from services.app import create_app
from services.delivery.channel import SentinelChannel
from services.delivery.connection import CONNECTION_OPTIONS, Connection
from services.worker.worker import Worker

SETTINGS = load()
# Celery takes these, where they are set, before what a test gives an application of its own.
for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
    os.environ.pop(name, None)


class TestWorker(testing_worker.TestWorkController, Worker):  # type: ignore[misc]
    """Stalk's worker in a thread: the signals and the log of its process are the tests'."""

    def on_init_blueprint(self) -> None:
        """Set up no log."""

    def on_start(self) -> None:
        """Handle no signals."""


class TestConnection(Connection):
    """Stalk's connection; what it would refuse, such as other names for its keys, is taken out of kombu's tests."""

    def __init__(self, *arguments: Any, transport_options: dict[str, Any] | None = None, **options: Any) -> None:
        read = {*SentinelChannel.from_transport_options, *CONNECTION_OPTIONS}
        kept = {name: value for name, value in (transport_options or {}).items() if name in read}
        super().__init__(*arguments, transport_options=kept, **options)


def make_app(
    name: str | None = None,
    config: dict[str, Any] | None = None,
    enable_logging: bool = False,
    set_as_current: bool = False,
    log: Any = testing_app.UnitLogging,
) -> Any:
    """Stalk's application, configured as Celery's TestApp is."""
    app = create_app(SETTINGS)
    if not enable_logging:
        app.log_cls = log
    app.conf.update(deepcopy(testing_app.DEFAULT_TEST_CONFIG) | (config or {}))
    return app


# Celery's fixtures and tests look all of these up when they start something.
testing_app.TestApp = make_app
testing_worker._start_worker_thread = partial(testing_worker._start_worker_thread, WorkController=TestWorker)
kombu.Connection = TestConnection
