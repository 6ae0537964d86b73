"""The unit tests, and those of delivery that are quick, on each other Python that this machine has."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis.builds import find_uv

ROOT = Path(__file__).resolve().parents[2]
# Each with the ports that its tests take: the tests that run beside these take others.
PYTHONS = {"3.11": "10000-12500", "3.12": "12500-15000", "3.13": "15000-17500", "3.14": "17500-20000"}
TESTS = ("tests/unit", "tests/integration/delivery/test_transport.py", "tests/integration/broker/test_preflight.py")
# Fetching all packages into an empty cache, on a slow line; and a minute of tests on a machine with much else to do.
INSTALL_SECONDS = 300
TEST_SECONDS = 900


def find_python(version: str) -> str | None:
    """A Python of this version, on PATH or among pyenv's; its shims on PATH may lead nowhere."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    on_path = shutil.which(f"python{version}")
    for found in [*([on_path] if on_path else []), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=False)
        if done.stdout.startswith(f"Python {version}."):
            return found
    return None


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name: below pytest's own the path of a socket would be too long."""
    with tempfile.TemporaryDirectory(prefix="stalk-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_tests_pass_on_another_python(version: str, place: Path) -> None:
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip(f"Python {version} runs all other tests here")
    found, uv = find_python(version), find_uv()
    if not (found and uv):
        pytest.skip(f"Python {version} is not available here" if uv else "no uv in the virtual environment")
    environment = {
        # Otherwise pytest would take itself for a worker of the pytest that runs this.
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "VIRTUAL_ENV": str(place / "venv"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "STALK_TEST_PORTS": PYTHONS[version],
    }
    python = place / "venv" / "bin" / "python"
    # fmt: off
    run([uv, "venv", "--quiet", "--python", found, str(place / "venv")], environment, INSTALL_SECONDS)
    run([uv, "pip", "sync", "--quiet", "--require-hashes", "requirements/dev.lock"], environment, INSTALL_SECONDS)
    run([str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-m", "not slow",
         "-p", "no:cacheprovider", f"--basetemp={place / 't'}", *TESTS], environment, TEST_SECONDS)
    # fmt: on


def run(command: list[str], environment: dict[str, str], seconds: float) -> None:
    """Run a command from the checkout, which must succeed."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
