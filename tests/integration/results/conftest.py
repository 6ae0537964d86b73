"""A stack that has a Redis of its own for results, so that broker and results can fail one without the other."""

import pytest

from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.harness import Harness, Stack
from tests.support.redis.server import RedisServer

SOFT_SHUTDOWN = 2


@pytest.fixture(scope="module")
def results(shared_harness: Harness) -> RedisServer:
    """The Redis that keeps the results."""
    return shared_harness.redis()


@pytest.fixture(scope="module")
def stack(shared_harness: Harness, results: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A stack without workers, whose code gives up and tries again sooner than it is shipped."""
    checkout = Checkout(tmp_path_factory.mktemp("impatient") / "code", LIBRARIES_ONLY)
    checkout.replace("config/celery.py", "\nSOCKET_TIMEOUT_SECONDS = 10", "\nSOCKET_TIMEOUT_SECONDS = 2")
    checkout.replace("config/settings.py", "ge=45", "ge=1")
    checkout.replace("services/broker/retry.py", "LONGEST_PAUSE_SECONDS = 5.0", "LONGEST_PAUSE_SECONDS = 1.0")
    checkout.replace("services/broker/retry.py", "BROKEN_TRIES = 10", "BROKEN_TRIES = 3")
    shared_harness.checkout = checkout
    return shared_harness.stack(
        CELERY_RESULT_BACKEND=results.url(1, password=""),
        WORKER_SOFT_SHUTDOWN=str(SOFT_SHUTDOWN),
        WORKER_STOP_GRACE_PERIOD=str(SOFT_SHUTDOWN + 15),
    )
