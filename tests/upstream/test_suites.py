"""Celery's and kombu's own tests pass with Stalk in the place of what they test, except for those that are listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import Harness
from tests.support.redis.builds import NotAvailableError
from tests.upstream.sources import ROOT, get
from tests.upstream.suites import HOME, Suite

LISTS = Path(__file__).parent
CELERY, KOMBU = (Suite.read(LISTS / f"{package}.toml") for package in ("celery", "kombu"))
# A part takes one to two minutes, and on a machine with much else to do several times that.
PART_SECONDS = 900


SMALL = """
worker inspect connection_recovery events_state_memory_leak loader logfile_format request_backend_down serialization
upgrade
"""
# What one pytest runs: so that each takes about as long, the large files in pieces and the small ones together.
PARTS: dict[str, tuple[Suite, list[str], str]] = {
    **{f"celery-canvas-{number}of4": (CELERY, ["canvas"], f"{number}/4") for number in (1, 2, 3, 4)},
    "celery-tasks": (CELERY, ["tasks"], "1/1"),
    "kombu-redis": (KOMBU, ["redis", "redis_brpop_qos"], "1/1"),
    # In this order: with stock Celery, too, some of test_redis_backend.py do not pass where other tests have left
    # results, and one of test_worker.py where a worker runs already.
    "celery-backend": (CELERY, ["redis_backend", "beat", "group_chains"], "1/1"),
    "celery-small": (CELERY, SMALL.split(), "1/1"),
}


def find_sources(suite: Suite) -> Path:
    """The directory of the suite's tests; skips where they are not available, or fails with STALK_REQUIRE_SUITES=1."""
    try:
        return get(suite.package, suite.config)
    except NotAvailableError as error:
        if os.environ.get("STALK_REQUIRE_SUITES") == "1":
            pytest.fail(f"STALK_REQUIRE_SUITES=1, and {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_their_tests_pass_as_listed(part: str, harness: Harness) -> None:
    suite, files, piece = PARTS[part]
    tests, redis = find_sources(suite), harness.redis(password="")
    port = str(redis.port)
    # Some of them look for results where messages are.
    urls = dict.fromkeys(("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "TEST_BROKER", "TEST_BACKEND"), redis.url())
    environment = harness.environment(
        **urls,
        REDIS_HOST="127.0.0.1",
        REDIS_PORT=port,
        REDIS_6379_TCP=port,
        # They start `celery`.
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=os.pathsep.join(map(str, (harness.checkout.path, ROOT, tests))),
    )
    # fmt: off
    command = [
        sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider",
        "-p", "celery.contrib.pytest", "-p", "tests.upstream.verdicts", "-p", "tests.upstream.stalk",
        f"--suite={LISTS / suite.package}.toml", f"--part={piece}", f"--basetemp={harness.path('tests')}",
        *(f"{HOME}test_{file}.py" for file in files),
    ]
    # fmt: on
    process = harness.process("suite", command, environment, tests)
    try:
        ended = f"exit code {process.wait(PART_SECONDS)}"
    except subprocess.TimeoutExpired:
        ended = f"not over after {PART_SECONDS} s"
    if ended != "exit code 0":
        pytest.fail(f"{part}: {ended}\n{process.log()}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("suite", [CELERY, KOMBU], ids=lambda suite: suite.package)
def test_each_file_of_theirs_runs_or_is_left_out_for_a_reason(suite: Suite) -> None:
    there = {path.name for path in (find_sources(suite) / HOME).glob("test_*.py")}
    run = {f"test_{file}.py" for of, files, _ in PARTS.values() if of is suite for file in files}
    left_out = {name for name in suite.lists["left_out"] if name.endswith(".py")}
    assert run | left_out == there
    assert not run & left_out
