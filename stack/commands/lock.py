"""make lock: pin the version of every package, with its hashes."""

import re
import subprocess
from pathlib import Path

from stack.errors import CommandError
from stack.paths import ROOT

# One lock for Python 3.11 on a host to 3.13 in the image, on every platform; no index address in it.
COMPILE = (
    ".venv/uv/uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes",
    "--no-header", "--no-emit-index-url", "--python-version", "3.11",
)  # fmt: skip
REQUIREMENTS = ROOT / "requirements"


def lock() -> None:
    """Write the locks of the image, of the user's packages and of development; pins that still fit are kept."""
    compile_lock("image.lock", "pyproject.toml")
    # What the image has already is not pinned a second time, so that an update of Stalk does not conflict.
    known = [argument for name in read_names(REQUIREMENTS / "image.lock") for argument in ("--no-emit-package", name)]
    compile_lock("own.lock", "requirements/own.txt", "--constraints", "requirements/image.lock", *known)
    # A host without Docker runs the tasks with both.
    constraints = ["--constraints", "requirements/image.lock", "--constraints", "requirements/own.lock"]
    compile_lock("dev.lock", "pyproject.toml", "--group", "dev", *constraints)
    print("Wrote requirements/image.lock, own.lock and dev.lock; 'make up' builds with them.")


def compile_lock(output: str, *arguments: str) -> None:
    """Write one lock; CommandError after uv has printed which packages conflict."""
    command = [*COMPILE, *arguments, "--output-file", f"requirements/{output}"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        why = "uv's message above says which packages conflict"
        raise CommandError(f"requirements/{output} could not be resolved: {why}")


def read_names(path: Path) -> list[str]:
    """The names of the packages in a lock."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", path.read_text(encoding="utf-8"), re.MULTILINE)
