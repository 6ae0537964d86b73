"""Time limits of a task: those of its message, its author or an operator replace the limits of all tasks."""

import math
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """Seconds after which a task is killed, and after which it is asked to end; None: never."""

    hard: float | None = None
    soft: float | None = None


# The limits that tasks had from their authors before an operator has changed them (remote control's time_limit).
_authored: dict[str, Limits] = {}


def resolve(given: Limits, task: Any, general: Limits) -> Limits:
    """The limits of one run: those in its message, else those of its task, else those of all tasks.

    A producer that knows the task writes the author's limits into each message: an operator's replace these.
    """
    if given == _authored.get(task.name):
        given = Limits()
    return add_missing(Limits(given.hard or task.time_limit, given.soft or task.soft_time_limit), general)


def add_missing(own: Limits, general: Limits) -> Limits:
    """Both limits where one or none is given: a hard one is added to a soft one, but no soft one to a hard one."""
    if not own.hard and not own.soft:
        return general
    if not own.hard and own.soft:
        # As long after it as the hard limit of all tasks is after their soft one.
        gap = (general.hard or 0) - (general.soft or 0)
        return Limits(own.soft + gap if gap > 0 else None, own.soft)
    # No soft limit after the hard one: billiard would wait for it first, and kill too late (billiard 4.3).
    soft = own.soft if own.soft and own.hard and own.soft < own.hard else None
    return Limits(own.hard, soft)


def change(task: Any, limits: Limits) -> None:
    """Give a task other limits than its author has."""
    _authored.setdefault(task.name, Limits(task.time_limit, task.soft_time_limit))
    task.time_limit, task.soft_time_limit = limits


def find_problem(limits: Limits) -> str:
    """Say why these cannot be limits; "" when they can."""
    for name, limit in zip(("hard", "soft"), limits, strict=True):
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 < limit < math.inf):
            return f"the {name} time limit is {limit!r}, and must be a number of seconds above 0"
    if limits.hard and limits.soft and limits.soft >= limits.hard:
        return f"the soft time limit ({limits.soft:g} s) must be below the hard one ({limits.hard:g} s)"
    return ""
