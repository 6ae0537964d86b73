"""stack.checkout_lock: one command at a time in a checkout."""

import os
from pathlib import Path

import pytest

from stack import paths
from stack.checkout_lock import lock_checkout


def test_who_has_the_turn_is_named_and_is_not_afterwards(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["stack", "up"])
    with lock_checkout():
        assert paths.LOCK.read_text() == f"'make up' (pid {os.getpid()})\n"
    assert paths.LOCK.read_text() == ""
