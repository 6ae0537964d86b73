"""Run tests marked `each_redis` once more on every other Redis build: `--redis each`, as `make test-slow` does.

`--redis NAME` runs all tests on one build instead of the machine's own; tests/support/redis/builds.py has the names.
With STALK_REQUIRE_REDIS=1 a build that is not available ends the session.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.redis import server as redis_server
from tests.support.redis.builds import BUILDS, NotAvailableError, get_build, identify

EACH = "each"
FIXTURE = "redis_build"
# The program of each build of this session, or the reason why it is not available.
PROGRAMS = pytest.StashKey[dict[str, str]]()
REASONS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [build.name for build in BUILDS]
    parser.addoption("--redis", choices=[EACH, *names], help="the Redis that tests run on; the machine's if not given")


def pytest_configure(config: pytest.Config) -> None:
    """Get the builds, once for all workers of a session."""
    wanted = config.getoption("--redis")
    handed = getattr(config, "workerinput", {})
    programs: dict[str, str] = handed.get("redis_programs", {})
    reasons: dict[str, str] = handed.get("redis_reasons", {})
    if not handed:
        own = identify(redis_server.own())
        for build in BUILDS:
            if wanted == build.name or (wanted == EACH and build.name != own):
                try:
                    programs[build.name] = str(get_build(build))
                except NotAvailableError as error:
                    reasons[build.name] = str(error)
    config.stash[PROGRAMS], config.stash[REASONS] = programs, reasons
    if wanted in reasons or (reasons and os.environ.get("STALK_REQUIRE_REDIS") == "1"):
        raise pytest.UsageError("; ".join(reasons.values()))
    if wanted in programs:
        redis_server.use(programs[wanted])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Pass them on to a worker of pytest-xdist."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    node.workerinput.update(  # type: ignore[attr-defined]
        redis_programs=config.stash[PROGRAMS], redis_reasons=config.stash[REASONS]
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"redis: {identify(redis_server.own())}" + "".join(f", {found}" for found in config.stash[PROGRAMS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Add a copy of each marked test for each build; the test itself stays what it is, name and all."""
    if metafunc.config.getoption("--redis") != EACH or not metafunc.definition.get_closest_marker("each_redis"):
        return
    stash = metafunc.config.stash
    copies = [pytest.param(found, id=found, marks=pytest.mark.slow) for found in stash[PROGRAMS]]
    copies += [
        pytest.param(missing, id=missing, marks=[pytest.mark.slow, pytest.mark.skip(reason=why)])
        for missing, why in stash[REASONS].items()
    ]
    itself = pytest.param("", id=pytest.HIDDEN_PARAM)
    metafunc.parametrize(FIXTURE, [itself, *copies], indirect=True, scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out copies of what is slow by itself, and those whose parameters the mark does not name."""
    out = [item for item in items if build_of(item) and not is_wanted(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not build_of(item) or is_wanted(item)]


def build_of(item: pytest.Item) -> str:
    """The build that a copy is for; "" for a test itself."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get(FIXTURE, "")) if callspec else ""


def is_wanted(item: pytest.Item) -> bool:
    """Whether a copy is worth its time: `each_redis("a", "b")` asks for those with such a parameter."""
    mark = item.get_closest_marker("each_redis")
    if mark and mark.args:
        return bool(set(mark.args) & {str(value) for value in item.callspec.params.values()})  # type: ignore[attr-defined]
    # One of them is the copy's own.
    return len(list(item.iter_markers("slow"))) == 1


@pytest.fixture(scope="module", autouse=True)
def redis_build(request: pytest.FixtureRequest) -> Iterator[None]:
    """The Redis that the test's servers are made of; whatever starts one asks for this first."""
    build = getattr(request, "param", "")
    if not build:
        yield
        return
    before = redis_server.use(request.config.stash[PROGRAMS][build])
    yield
    redis_server.use(before)
