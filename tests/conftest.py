"""Fixtures for all tests that start something: Redis servers and processes of the stack."""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.checkout import Checkout
from tests.support.fork_server import LIBRARIES_ONLY, ForkServer
from tests.support.harness import Harness
from tests.support.redis.server import RedisServer
from tests.support.waiting import GaveUp

# What a shell starts in the background ignores Ctrl-C and Ctrl-\, and so would all that tests start and press it for.
# A CI job that is cancelled gets TERM, and what tests have started must not outlive it.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# The host's proxy, where it has one, is for what lies outside of this machine.
direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
os.environ["no_proxy"] = f"{direct},127.0.0.1"

PLUGINS = ("each_redis", "checkout_guard", "scheduling", "summary")
pytest_plugins = [f"tests.support.pytest_plugins.{name}" for name in PLUGINS]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A copy of the code that no test changes."""
    path = tmp_path_factory.mktemp("checkout") / "code"
    with closing(ForkServer(path)) as fork_server:
        yield Checkout(path, fork_server)


@pytest.fixture
def own_checkout(tmp_path: Path) -> Checkout:
    """A copy of the code that the test may change."""
    return Checkout(tmp_path / "code", LIBRARIES_ONLY)


@pytest.fixture
def harness(tmp_path: Path, checkout: Checkout, redis_build: None) -> Iterator[Harness]:
    """What the test starts, and its end."""
    with Harness(tmp_path, checkout).opened() as harness:
        yield harness


@pytest.fixture(scope="module")
def shared_harness(
    tmp_path_factory: pytest.TempPathFactory, checkout: Checkout, redis_build: None
) -> Iterator[Harness]:
    """What all tests of a module use together."""
    with Harness(tmp_path_factory.mktemp("shared"), checkout).opened() as harness:
        yield harness


@pytest.fixture
def redis_server(harness: Harness) -> Callable[..., RedisServer]:
    """Starts a Redis server; see Harness.redis."""
    return harness.redis


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed shows the state and the last lines of everything that it had started."""
    report = yield
    # A wait that failed has told all of it already.
    if report.failed and not (call.excinfo and call.excinfo.errisinstance(GaveUp)):
        for harness in Harness.existing:
            report.sections.append((f"processes in {harness.directory}", harness.describe()))
    return report
