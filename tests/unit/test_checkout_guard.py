"""Use of the checkout's own stack in a test is refused, and fails the test where the refusal is swallowed."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config import load
from tests.support.checkout import ROOT
from tests.support.pytest_plugins.checkout_guard import PORT, tried


@pytest.fixture(autouse=True)
def _on_purpose() -> Iterator[None]:
    """What is tried here is no mistake."""
    yield
    tried.clear()


def connect(family: socket.AddressFamily, address: Any) -> None:
    with socket.socket(family) as client:
        client.connect(address)


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        (load, ".env"),
        ((ROOT / ".env").read_text, ".env"),
        (lambda: (ROOT / ".env.tasks").write_bytes(b""), ".env.tasks"),
        ((ROOT / "tests" / ".." / ".stalk" / "runtime").read_text, ".stalk/runtime"),
        ((ROOT / ".stalk").mkdir, ".stalk"),
        (lambda: (ROOT / "nothing of this name").rename(ROOT / ".env"), ".env"),
        (lambda: connect(socket.AF_INET, ("127.0.0.1", PORT)), f"port {PORT}"),
        (lambda: connect(socket.AF_UNIX, str(ROOT / ".stalk/run/redis.sock")), ".stalk/run/redis.sock"),
        (lambda: subprocess.run(["docker", "compose", "ps"], cwd=ROOT, check=False), "the Compose project"),
    ],
    ids=["load", "read", "write", "state", "make", "rename", "port", "socket", "compose"],
)
def test_it_is_refused_and_recorded(touch: Callable[[], object], what: str) -> None:
    with pytest.raises(AssertionError, match=r"the checkout's own"):
        touch()

    assert tried == [str(ROOT / what) if what.startswith(".") else what]


def test_a_file_of_the_tests_own_is_not(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("")
    (tmp_path / ".stalk").mkdir()

    assert tried == []
