"""What belongs to the checkout's own stack, which no test reads, writes or needs: it may run, or be broken."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

STATE = str(ROOT / ".stalk")
FILES = tuple(str(ROOT / name) for name in (".env", ".env.tasks"))
# Flower's.
PORT = 8080
# Audit events whose first argument is a path that is about to be used, and those whose second is an address.
USES = frozenset(
    {"open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate"}
)
CONNECTS = frozenset({"socket.bind", "socket.connect"})
# What this process has tried to use; code under test may swallow the refusal.
tried: list[str] = []


def is_own(path: str) -> bool:
    """Whether a path is part of the checkout's own state."""
    return path in FILES or path == STATE or path.startswith(f"{STATE}{os.sep}")


def own(event: str, arguments: tuple[object, ...]) -> str:
    """What of the checkout's own an event is about; "" for nothing."""
    if event in CONNECTS:
        address = arguments[1]
        return f"port {PORT}" if isinstance(address, tuple) and address[1:2] == (PORT,) else ""
    if event not in USES or not isinstance(arguments[0], str | bytes | os.PathLike):
        return ""
    # Our code names all files in full. A relative path may be below any directory: events do not tell which.
    path = os.path.normpath(os.fsdecode(arguments[0]))
    return path if is_own(path) else ""


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Let no code in this process use it; an audit hook."""
    if what := own(event, arguments):
        tried.append(what)
        raise AssertionError(f"a test uses {what}, which is the checkout's own: see the fixture `elsewhere`")


sys.addaudithook(refuse)


@pytest.fixture(autouse=True)
def _nothing_of_the_checkouts_own_is_used() -> Iterator[None]:
    """The result of a test is the same before, while and after the stack of this checkout is up."""
    yield
    found = list(tried)
    tried.clear()
    assert not found, f"the test has tried to use {', '.join(found)}"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the modules of `stack` and `config`, where they run in this process, have their state in."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("stack", "config"):
            continue
        for constant, value in list(vars(module).items()):
            if isinstance(value, Path) and is_own(str(value)):
                monkeypatch.setattr(module, constant, tmp_path / value.relative_to(ROOT))
    return tmp_path
