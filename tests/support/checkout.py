"""A copy of what the image holds: tests run the stack from it, without this checkout's .env, and may change it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.nursery import Nursery

ROOT = Path(__file__).resolve().parents[2]
# As docker/Dockerfile copies it.
CODE = ("config", "services", "docker")
# Tasks that tests need: sleeping, burning CPU, and writing down each start and end.
PROBE = "probe"
# Importing the application takes a second on an idle machine.
RUN_SECONDS = 120


class Checkout:
    """Code of the stack under a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        # Where the code's programs come from, as long as nobody changes the code.
        self.nursery: Nursery | None = None
        for name in CODE:
            # What is compiled there may be being written just now, or by another user.
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("probe.py"), directory / f"{PROBE}.py")

    def replace(self, file: str, old: str, new: str) -> None:
        """Change a file; fails when what is to be changed is not there."""
        path = self.path / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def write(self, file: str, text: str) -> None:
        """Add a file."""
        (self.path / file).write_text(text)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments to its end, with nothing but PATH and `environment`."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **environment},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
