"""A board in memory that children share with their parent: until when the deliveries that the pool has are ours.

The parent alone writes. Each delivery has a number, and so a place that it gives up when many others have come after
it: who looks for it then finds that it is gone.
"""

from __future__ import annotations

import mmap
from itertools import count

# More than a node has children, so more than lie in their pipes at a time. All of them take 64 KiB.
PLACES = 4096
# Of each of the two values of a place. It is written and read as a whole, because it is aligned.
BYTES = 8
# The number of no delivery: what an empty place has.
NOTHING = 0
# Of a delivery that is not ours any more: before everything.
NEVER = 0.0


class Board:
    """What a parent tells the children that it forks after making this."""

    def __init__(self) -> None:
        shared = memoryview(mmap.mmap(-1, 2 * BYTES * PLACES))
        self._numbers = shared[: BYTES * PLACES].cast("q")
        self._untils = shared[BYTES * PLACES :].cast("d")
        self._next = count(NOTHING + 1)

    def put_up(self, until: float) -> Notice:
        """Say until when one more delivery is ours."""
        number = next(self._next)
        place = number % PLACES
        # In this order, so that nobody takes the new time for one of the old delivery.
        self._untils[place] = NEVER
        self._numbers[place] = number
        self._untils[place] = until
        return Notice(self, number)

    def change(self, number: int, until: float) -> None:
        """Say something else about a delivery, unless its place has been given to another one."""
        if self._numbers[number % PLACES] == number:
            self._untils[number % PLACES] = until

    def until(self, number: int) -> float:
        """Until when a delivery is ours; NEVER when nothing is known of it."""
        until = self._untils[number % PLACES]
        return until if self._numbers[number % PLACES] == number else NEVER


class Notice:
    """What stands on a board about one delivery."""

    __slots__ = ("_board", "number")

    def __init__(self, board: Board, number: int) -> None:
        self._board, self.number = board, number

    def change(self, until: float) -> None:
        """It is ours until then."""
        self._board.change(self.number, until)

    def take_down(self) -> None:
        """It is not ours any more."""
        self.change(NEVER)
