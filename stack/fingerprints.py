"""Has anything changed? Hashes of what programs run on."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(*paths: Path, extra: str = "") -> str:
    """A hash of the content of files and directories."""
    parts = [extra]
    for path in paths:
        inside = [file for file in sorted(path.rglob("*")) if not is_scratch(file)] if path.is_dir() else [path]
        for file in inside:
            if file.is_file():
                parts += [str(file), hashlib.sha256(file.read_bytes()).hexdigest()]
    return digest(*parts)


def is_scratch(file: Path) -> bool:
    """Whether a file is byte code, or an editor's copy that is gone in a moment."""
    return file.name.startswith(".") or file.name.endswith(("~", ".pyc", ".tmp"))


def digest(*parts: str) -> str:
    """A hash of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
