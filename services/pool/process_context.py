"""How a prefork pool makes what it shares with its children: without locks that a killed child leaves locked.

Each child has a counter of the results that the node has read; the child waits for it when it ends. billiard guards it
with a lock of both processes. A child that is killed while it reads the counter, as one that ended its task just at its
hard time limit may be, leaves it locked, and the node's main loop waits for it for ever (billiard 4.3). Only the main
process writes the counter, an integer that is written at once, so it needs no lock between processes.
"""

import copy
from threading import RLock
from typing import Any

from billiard import get_context


def make_context() -> Any:
    """A context of billiard whose values are locked within one process only."""
    context = copy.copy(get_context())

    def make_value(kind: str) -> Any:
        return get_context().Value(kind, lock=RLock())

    context.Value = make_value
    return context
