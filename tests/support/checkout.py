"""A copy of what the image holds: tests run the stack from it, without this checkout's .env, and may change it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.support.fork_server import LIBRARIES_ONLY, ForkServer

ROOT = Path(__file__).resolve().parents[2]
# As docker/Dockerfile copies it.
CODE = ("config", "services", "docker")
TASK_MODULES = Path(__file__).with_name("task_modules")
# Tasks that most tests need: sleeping, burning CPU, and recording each start and end.
PROBE = "probe"
# Importing the application takes a second on an idle machine.
RUN_SECONDS = 120
# Not byte code: another user, or another process at this moment, may be writing it.
SKIPPED = ("__pycache__", "test_*")


class Checkout:
    """Code of the stack under a directory of the test's own, with the tasks of probe.py.

    `packages` are copied beside it, as paths from the root. Its programs are forked from `fork_server`, or get an
    interpreter each where that is None.
    """

    def __init__(self, directory: Path, fork_server: ForkServer | None = None, packages: Iterable[str] = ()) -> None:
        self.path, self.fork_server = directory, fork_server
        for name in (*CODE, *packages):
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns(*SKIPPED))
        if packages:
            shutil.copy(ROOT / "tests" / "__init__.py", directory / "tests")
        self.add_task_modules(PROBE)

    def add_task_modules(self, *names: str) -> None:
        """Copy modules of tests/support/task_modules, for CELERY_IMPORTS to name."""
        for name in names:
            shutil.copy(TASK_MODULES / f"{name}.py", self.path)

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace `old`, which must stand in the file exactly once."""
        path = self.path / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def write(self, file: str, text: str) -> None:
        """Write a file."""
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


def odd_checkout(directory: Path) -> Checkout:
    """A copy with the task modules of odd endings, broadcasts and deduplication; the test may change it."""
    checkout = Checkout(directory, LIBRARIES_ONLY)
    checkout.add_task_modules("odd_tasks", "odd_broadcast", "odd_dedupe")
    return checkout
