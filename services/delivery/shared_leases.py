"""A table in memory that a pool's children share with their parent: until when the leases of its deliveries last.

Only the parent writes. A delivery has a number, and with it a slot, which it loses when many others have come after it:
whoever looks it up then finds that it is gone.
"""

import mmap
from itertools import count

# More than a node has children, so more than lie in their pipes at a time. All of them take 64 KiB.
SLOTS = 4096
# Of each of the two values of a slot. It is written and read as a whole, because it is aligned.
BYTES = 8
# The number of no delivery, in an empty slot.
NOTHING = 0
# The end of a lease that was lost: before everything.
NEVER = 0.0


class SharedLeaseTable:
    """The ends of leases, for the children that this process forks after making it."""

    def __init__(self) -> None:
        shared = memoryview(mmap.mmap(-1, 2 * BYTES * SLOTS))
        self._numbers = shared[: BYTES * SLOTS].cast("q")
        self._untils = shared[BYTES * SLOTS :].cast("d")
        self._next = count(NOTHING + 1)

    def add(self, until: float) -> "LeaseSlot":
        """Give one more delivery a slot; its lease lasts `until`."""
        number = next(self._next)
        slot = number % SLOTS
        # In this order, so that nobody takes the new time for one of the old delivery.
        self._untils[slot] = NEVER
        self._numbers[slot] = number
        self._untils[slot] = until
        return LeaseSlot(self, number)

    def set(self, number: int, until: float) -> None:
        """Change the end of a lease, unless its slot has been given to another delivery."""
        if self._numbers[number % SLOTS] == number:
            self._untils[number % SLOTS] = until

    def until(self, number: int) -> float:
        """The end of a lease; NEVER when the table does not know it."""
        until = self._untils[number % SLOTS]
        return until if self._numbers[number % SLOTS] == number else NEVER


class LeaseSlot:
    """The slot of one delivery."""

    __slots__ = ("_table", "number")

    def __init__(self, table: SharedLeaseTable, number: int) -> None:
        self._table, self.number = table, number

    def set(self, until: float) -> None:
        """Set the end of its lease."""
        self._table.set(self.number, until)

    def clear(self) -> None:
        """Its lease was lost, or its delivery is over."""
        self.set(NEVER)
