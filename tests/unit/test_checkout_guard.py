"""Use of the checkout's own stack in a test is refused, and fails the test where the refusal is swallowed."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config import load
from tests.support.checkout import ROOT
from tests.support.pytest_plugins.checkout_guard import PORT, tried


@pytest.fixture(autouse=True)
def _on_purpose() -> Iterator[None]:
    """What is tried here is no mistake."""
    yield
    tried.clear()


def connect() -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", PORT))


def connect_by_path() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(ROOT / ".stalk" / "run" / "redis.sock"))


def rename() -> None:
    (ROOT / "nothing of this name").rename(ROOT / ".env")


def compose() -> None:
    subprocess.run(["docker", "compose", "ps"], cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        (load, ROOT / ".env"),
        ((ROOT / ".env").read_text, ROOT / ".env"),
        ((ROOT / ".env.tasks").write_bytes, ROOT / ".env.tasks"),
        ((ROOT / "tests" / ".." / ".stalk" / "runtime").read_text, ROOT / ".stalk" / "runtime"),
        ((ROOT / ".stalk").mkdir, ROOT / ".stalk"),
        (rename, ROOT / ".env"),
        (connect, f"port {PORT}"),
        (connect_by_path, ROOT / ".stalk" / "run" / "redis.sock"),
        (compose, "the Compose project"),
    ],
    ids=["load", "read", "write", "state", "make", "rename", "port", "socket", "compose"],
)
def test_it_is_refused_and_recorded(touch: Callable[..., object], what: Path | str) -> None:
    arguments = [b""] if getattr(touch, "__name__", "") == "write_bytes" else []

    with pytest.raises(AssertionError, match=r"the checkout's own"):
        touch(*arguments)

    assert tried == [str(what)]


def test_a_file_of_the_tests_own_is_not(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("")
    (tmp_path / ".stalk").mkdir()

    assert tried == []
