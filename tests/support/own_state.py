"""What belongs to the checkout's own stack, which no test reads, writes or needs: it may run, or be broken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT

PATHS = tuple(str(ROOT / name) for name in (".stalk", ".env", ".env.tasks"))
WITHIN = f"{ROOT}/.stalk/"
# Audit events whose first argument is a path that is about to be used.
USES = frozenset(
    {"open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate"}
)


def is_own(path: str) -> bool:
    """Whether a path is part of the checkout's own state."""
    # Our code names all files in full. A relative path may be below any directory: events do not tell which.
    return path.startswith(WITHIN) or path in PATHS


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Let no code in this process use it, whatever the code makes of the error."""
    if event in USES and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        assert not is_own(path), f"a test uses {path}, which is the checkout's own: see the fixture `elsewhere`"


sys.addaudithook(refuse)


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
