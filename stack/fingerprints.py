"""Hashes of files, by which a change of what a program runs on is seen."""

import hashlib
from contextlib import suppress
from pathlib import Path


def hash_files(*paths: Path, extra: str = "") -> str:
    """One hash of the content of files and directories, and of `extra`; a path that does not exist adds nothing."""
    return hash_texts(extra, *(part for pair in hash_each_file(*paths).items() for part in pair))


def hash_each_file(*paths: Path) -> dict[str, str]:
    """Path → hash of the content, of each file, and of those in directories."""
    found = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            # Byte code, or a temporary copy of an editor.
            if path.is_dir() and (file.name.startswith(".") or file.name.endswith(("~", ".pyc", ".tmp"))):
                continue
            # An editor may remove one meanwhile.
            with suppress(FileNotFoundError):
                if file.is_file():
                    found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def hash_texts(*parts: str) -> str:
    """One hash of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
