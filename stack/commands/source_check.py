"""Is the source right that is about to run? Asked by `make up` before anything is replaced, by `make dev` each time."""

from __future__ import annotations

import subprocess

from config import ConfigError
from stack.docker.engine import last_line

MARK = "error: "


def refuse(tried: subprocess.CompletedProcess[str], and_so: str) -> None:
    """Raise ConfigError with what `python -m services.commands.check` found, if anything; `and_so` is what follows."""
    if tried.returncode == 0:
        return
    lines = [line.removeprefix(MARK) for line in tried.stderr.splitlines() if line.startswith(MARK)]
    raise ConfigError(f"{line}; {and_so}" for line in lines or [last_line(tried.stderr)])
