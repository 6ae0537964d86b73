"""A plugin of the pytest that runs a suite: what is listed must fail, what is not must pass, and nothing may hang."""

import faulthandler
import os
import signal
from collections.abc import Generator
from itertools import chain
from pathlib import Path

import pytest

from tests.upstream.suites import HOME, Suite, is_listed

# What a module's TIMEOUT becomes, which is 10 s or 60 s: a thousand tasks take 10 s, and on a busy machine much longer.
MODULE_TIMEOUT = 150
# The longest that runs takes 20 s on an idle machine. One that hangs is to cost no more than this.
TEST_SECONDS = 240


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", required=True, type=Path, help="the file with its lists")
    parser.addoption("--part", default="1/1", help="2/3: every third test, beginning with the second")
    parser.addoption("--test-seconds", type=int, default=TEST_SECONDS, help="what one test may take")


def pytest_configure(config: pytest.Config) -> None:
    # Of plugins that repeat what fails, and end what hangs. Nothing is repeated here.
    for marker in ("flaky", "timeout", "env"):
        config.addinivalue_line("markers", f"{marker}(…): without effect")
    # A copy, because pytest captures standard error.
    config.stash[ERRORS] = os.dup(2)


MARKS = {
    "left_out": pytest.mark.skip,
    "differs": pytest.mark.xfail(strict=True),
    "may_differ": pytest.mark.xfail(strict=False),
}
ERRORS = pytest.StashKey[int]()
HUNG = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is listed, and keep one part."""
    suite = Suite.read(config.getoption("--suite"))
    refuse_stale(suite, [item.nodeid for item in items])
    for item in items:
        for name, mark in MARKS.items():
            for listed, why in suite.lists[name].items():
                if is_listed(listed, item.nodeid):
                    item.add_marker(mark(reason=why), append=False)
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if hasattr(module, "TIMEOUT"):
            module.TIMEOUT = MODULE_TIMEOUT
    number, parts = map(int, config.getoption("--part").split("/"))
    items[:] = items[number - 1 :: parts]


def refuse_stale(suite: Suite, collected: list[str]) -> None:
    """Raise UsageError when a test is listed that is not in its file."""
    files = {name.partition("::")[0] for name in collected}
    for listed in chain(*suite.lists.values()):
        file = f"{HOME}{listed.partition('::')[0]}"
        if file in files and not any(is_listed(listed, name) for name in collected):
            raise pytest.UsageError(f"{listed} is listed for {suite.package} and is none of its tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a test that hangs, and show where all threads were."""

    def end(*_: object) -> None:
        item.stash[HUNG] = True
        faulthandler.dump_traceback(item.config.stash[ERRORS])
        # Not TimeoutError, after which Celery and kombu would try again.
        pytest.fail(f"it took longer than {seconds} s")

    seconds = item.config.getoption("--test-seconds")
    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that hung, even where it is listed as failing."""
    report = yield
    if item.stash.get(HUNG, False) and report.skipped:
        report.outcome = "failed"
        del report.wasxfail
    return report
