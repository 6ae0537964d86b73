"""Which tests share a pytest-xdist worker, how many workers there are, and which tests start first.

Tests that share a fixture of a module or of the session stay in one worker; all others run where there is room.
"""

import os
from collections import Counter

import pytest

from tests.support.pytest_plugins.each_redis import build_of

# Tests wait for other processes most of the time: so many workers keep a core busy.
WORKERS_PER_CORE = 3
# Each needs half a GB with all that it starts, and more of them do not shorten the groups of containers.
MOST_WORKERS = 12
# Fixtures that own something that many tests share: the containers, and the stack as processes.
CONTAINERS, FAULTS, PROCESSES = "containers", "containers of faults", "processes"
OWNERS = {"first_stack": CONTAINERS, "container_stack": FAULTS, "first_up": PROCESSES}
# The values of the parameter `deployment`, each the fixture of a runtime, and what that fixture owns: a test asks for
# it only when it runs, so that its name is not among those that pytest knows while it collects.
RUNTIMES = {"stack": "first_stack", "local": "first_up"}
# Files whose tests take a second one, because the first one alone would take longest of all.
SECOND_HALF = {
    CONTAINERS: frozenset({"test_call.py", "test_redis.py", "test_workers.py"}),
    PROCESSES: frozenset({"test_dead_letters.py", "test_dev.py", "test_new_task.py", "test_faults.py"}),
}
# Fixtures that each worker may make for itself, because they only copy files or ask a question.
CHEAP = frozenset({"checkout", "docker_engine", "tmp_path_factory", "bridge", "redis_build"})
# Whatever takes longest begins first, so that the end does not wait for it alone.
ORDER = (CONTAINERS, f"{CONTAINERS} 2", FAULTS, PROCESSES, f"{PROCESSES} 2")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The number of workers for `-n auto`."""
    return min(MOST_WORKERS, WORKERS_PER_CORE * len(os.sched_getaffinity(0)))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Name the test's group for `--dist loadgroup`, unless it names one itself: two names make a third group."""
    if not item.get_closest_marker("xdist_group") and (name := group(item)):
        item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those first that take longest: within a rank, groups of many tests."""
    sizes = Counter(name for item in items for name in group_names(item))
    items.sort(key=lambda item: (rank(item), -max((sizes[name] for name in group_names(item)), default=1)))


def group(item: pytest.Item) -> str:
    """The tests that have to run in the same worker as this one; "" when it may run anywhere."""
    for fixture, owner in OWNERS.items():
        if fixture in fixtures(item):
            return f"{owner} 2" if item.path.name in SECOND_HALF.get(owner, ()) else owner
    path = item.path.relative_to(item.config.rootpath)
    # A unit test takes less than it costs to hand it out alone.
    together = shares(item) or (path.is_relative_to("tests/unit") and not is_slow(item))
    return f"{path} {build_of(item)}".rstrip() if together else ""


def fixtures(item: pytest.Item) -> list[str]:
    """The names of all fixtures that a test uses, directly or not."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    runtime = RUNTIMES.get(parameters.get("deployment", ""), "")
    return [*getattr(item, "fixturenames", ()), *filter(None, [runtime])]


def shares(item: pytest.Item) -> bool:
    """Whether a test uses a fixture that lives longer than the test."""
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - pytest has no public way to ask (9.2)
    return any(
        used[-1].scope != "function" and name not in CHEAP
        for name, used in definitions.items()
        if used and used[-1].baseid.startswith("tests")
    )


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is slow by itself, and not a copy for another Redis."""
    return item.get_closest_marker("slow") is not None and not build_of(item)


def group_names(item: pytest.Item) -> list[str]:
    """The groups that a test has been put in: one, or none."""
    return [mark.args[0] for mark in item.iter_markers("xdist_group")]


def rank(item: pytest.Item) -> int:
    """The place of a test's group in the order of starting."""
    names = group_names(item)
    if names and names[0] in ORDER:
        return ORDER.index(names[0])
    # What is slow by itself is longer than a copy of a quick test for another Redis.
    return len(ORDER) if is_slow(item) else len(ORDER) + 1
