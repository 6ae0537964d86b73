"""Has anything changed? Hashes of what programs run on."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path


def fingerprint(*paths: Path, extra: str = "") -> str:
    """A hash of the content of files and directories."""
    return digest(extra, *(part for pair in contents(*paths).items() for part in pair))


def contents(*paths: Path) -> dict[str, str]:
    """A hash of the content of each file, and of those in directories."""
    found = {}
    for path in paths:
        inside = [file for file in sorted(path.rglob("*")) if not is_scratch(file)] if path.is_dir() else [path]
        for file in inside:
            # One that an editor takes away meanwhile is none.
            with suppress(FileNotFoundError):
                if file.is_file():
                    found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def is_scratch(file: Path) -> bool:
    """Whether a file is byte code, or an editor's copy that is gone in a moment."""
    return file.name.startswith(".") or file.name.endswith(("~", ".pyc", ".tmp"))


def digest(*parts: str) -> str:
    """A hash of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
