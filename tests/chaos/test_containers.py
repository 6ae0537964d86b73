"""The short form of the faults of the shipped containers: each on one pool by turns."""

from collections.abc import Iterator

import pytest

from tests.chaos.faults import CONTAINER_FAULTS
from tests.chaos.run import run_in_containers
from tests.chaos.subjects import POOLS, STALK
from tests.chaos.testbeds.base import Plan
from tests.chaos.testbeds.containers import ContainerStack, open_container_stack
from tests.stack.conftest import docker_engine

__all__ = ["docker_engine"]

# The least that the contract speaks of; less would be shorter than Docker takes to do what it is told.
LEASE = 10
COUNT, RATE = 200, 40.0
# Those of `make test`, on one pool, because another pool means other containers.
QUICK = {"container_worker_kill": "prefork", "container_redis_kill": "prefork"}
SLOW = {fault: POOLS[index % len(POOLS)] for index, fault in enumerate(CONTAINER_FAULTS) if fault not in QUICK}
TURNS = [
    *QUICK.items(),
    *(pytest.param(*turn, marks=pytest.mark.slow) for turn in sorted(SLOW.items(), key=lambda turn: turn[1])),
]


@pytest.fixture(scope="module")
def container_stack(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerStack]:
    """The stack that all tests here share."""
    with open_container_stack(tmp_path_factory.mktemp("chaos"), LEASE) as container_stack:
        yield container_stack


@pytest.mark.parametrize(("fault", "pool"), TURNS)
def test_nothing_is_lost_and_nothing_runs_twice_without_a_cause(
    fault: str, pool: str, container_stack: ContainerStack
) -> None:
    found = run_in_containers(container_stack, Plan(fault, pool, STALK, LEASE, 1, COUNT, RATE, seed=1))

    assert not found.breaches, found.describe()
    assert found.executed == found.sent > 0
