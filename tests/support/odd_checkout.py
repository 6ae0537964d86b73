"""A copy of the code in which there are odd_tasks.py and its neighbours as well."""

from __future__ import annotations

from pathlib import Path

from tests.support.checkout import Checkout
from tests.support.nursery import LIBRARIES_ALONE


def odd_checkout(directory: Path) -> Checkout:
    """The copy; more may be written into it before it is used."""
    checkout = Checkout(directory)
    checkout.nursery = LIBRARIES_ALONE
    for name in ("odd_tasks.py", "odd_broadcast.py", "odd_dedupe.py"):
        checkout.write(name, Path(__file__).with_name(name).read_text())
    return checkout
