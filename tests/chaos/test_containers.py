"""The short form of the faults of the shipped containers: each on one pool by turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.arena import Plan
from tests.chaos.containers import FAULTS, Harbour, opened
from tests.chaos.subjects import POOLS, STALK
from tests.stack.conftest import docker_engine

__all__ = ["docker_engine"]

# The least that the contract speaks of; less would be shorter than Docker takes to do what it is told.
LEASE = 10
COUNT, RATE = 200, 40.0
# Those of `make test`, on one pool, because another pool means other containers.
QUICK = {"container_worker_kill": "prefork", "container_redis_kill": "prefork"}
SLOW = {fault: POOLS[index % len(POOLS)] for index, fault in enumerate(FAULTS) if fault not in QUICK}
TURNS = [
    *QUICK.items(),
    *(pytest.param(*turn, marks=pytest.mark.slow) for turn in sorted(SLOW.items(), key=lambda turn: turn[1])),
]


@pytest.fixture(scope="module")
def harbour(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harbour]:
    """The stack that all tests here share."""
    with opened(tmp_path_factory.mktemp("chaos"), LEASE) as harbour:
        yield harbour


@pytest.mark.parametrize(("fault", "pool"), TURNS)
def test_nothing_is_lost_and_nothing_runs_twice_without_a_cause(fault: str, pool: str, harbour: Harbour) -> None:
    found = harbour.run(Plan(fault, pool, STALK, LEASE, 1, COUNT, RATE, seed=1))

    assert not found.breaches, found.told()
    assert found.executed == found.sent > 0
