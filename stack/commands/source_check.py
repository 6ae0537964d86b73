"""Whether the source that is about to run can be imported; checked before anything that runs is replaced."""

from __future__ import annotations

import subprocess

from config import ConfigError
from stack.docker.engine import find_last_line

PREFIX = "error: "


def require_success(check: subprocess.CompletedProcess[str], consequence: str) -> None:
    """Raise ConfigError with the errors that `python -m services.commands.check` printed, and their consequence."""
    if check.returncode == 0:
        return
    lines = [line.removeprefix(PREFIX) for line in check.stderr.splitlines() if line.startswith(PREFIX)]
    raise ConfigError(f"{line}; {consequence}" for line in lines or [find_last_line(check.stderr)])
