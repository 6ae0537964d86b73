"""The faults, by name. To add one, write a function with `@fault(…)` in the module of its kind.

The order is that of the rows of docs/chaos.md.
"""

from types import ModuleType

from tests.chaos.faults import connections, containers, nodes, redis, tasks
from tests.chaos.faults.fault import Fault


def collect(*modules: ModuleType) -> dict[str, Fault]:
    """The faults of these modules, in the order in which they are written."""
    return {each.name: each for module in modules for each in vars(module).values() if isinstance(each, Fault)}


FAULTS = collect(nodes, tasks, connections, redis)
CONTAINER_FAULTS = collect(containers)
ALL_FAULTS = FAULTS | CONTAINER_FAULTS
