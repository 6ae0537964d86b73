"""Refuse that a test uses the checkout's own stack: its .env, its .stalk/, its port, its Compose project.

So the result of a test does not depend on whether that stack runs or is broken.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

STATE = str(ROOT / ".stalk")
FILES = tuple(str(ROOT / name) for name in (".env", ".env.new", ".env.tasks", "compose.override.yaml"))
# Flower's.
PORT = 8080
# Audit events about a path that is about to be used; those about two; those about an address, their second argument.
USES = frozenset(
    {"open", "os.chmod", "os.chown", "os.listdir", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.truncate"}
)
USES_TWO = frozenset({"os.link", "os.rename", "os.symlink"})
CONNECTS = frozenset({"socket.bind", "socket.connect"})
STARTS = "subprocess.Popen"
# What this process has tried to use, because code under test may swallow the refusal.
tried: list[str] = []


def is_own(path: str) -> bool:
    """Whether a path is part of the checkout's own state."""
    return path in FILES or path == STATE or path.startswith(f"{STATE}{os.sep}")


def find_own(event: str, arguments: tuple[object, ...]) -> str:
    """The part of the checkout's own stack that an audit event is about; "" for none."""
    if event == STARTS:
        return find_compose_project(*arguments[1:3])
    if event in CONNECTS and isinstance(arguments[1], tuple):
        return f"port {PORT}" if arguments[1][1:2] == (PORT,) else ""
    paths = arguments[1:2] * (event in CONNECTS) + arguments[:1] * (event in USES) + arguments[:2] * (event in USES_TWO)
    # Our code names all files in full. A relative path may be below any directory: events do not tell which.
    named = [os.path.normpath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | os.PathLike)]
    return next(filter(is_own, named), "")


def find_compose_project(command: object, directory: object) -> str:
    """The same of a command: Docker Compose takes its project from where it runs, unless it is given a file."""
    words = [command] if isinstance(command, str | bytes | os.PathLike) else list(command)  # type: ignore[call-overload]
    named = [os.fsdecode(word) for word in words]
    here = Path(os.fsdecode(directory)) if isinstance(directory, str | bytes | os.PathLike) else Path.cwd()
    is_compose = Path(named[0]).name == "docker" and named[1:2] == ["compose"]
    return "the Compose project" if is_compose and here == ROOT and not {"-f", "version"} & {*named} else ""


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse the use of it; an audit hook."""
    if what := find_own(event, arguments):
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
    """Move the state of the modules of `stack` and `config` in this process to this directory."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("stack", "config"):
            continue
        for constant, value in list(vars(module).items()):
            if isinstance(value, Path) and is_own(str(value)):
                monkeypatch.setattr(module, constant, tmp_path / value.relative_to(ROOT))
    return tmp_path
