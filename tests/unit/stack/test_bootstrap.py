"""stack/bootstrap on hosts whose Python is missing, too old, or split into packages."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Until it looks for pip, the script needs these and nothing else.
TOOLS = ("sh", "dirname", "env")
# What an old Python answers, which does not know the numbers of the new ones.
OLD = 'case "$2" in *version_info*) exit 1 ;; esac\necho "Python 3.9.2"\n'


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A checkout's bootstrap, and a PATH that holds a few tools and no Python."""
    (tmp_path / "stack").mkdir()
    shutil.copy2(ROOT / "stack" / "bootstrap", tmp_path / "stack" / "bootstrap")
    (tmp_path / "bin").mkdir()
    add_tools(tmp_path, *TOOLS)
    return tmp_path


def give(host: Path, name: str, script: str) -> None:
    """Put a program on PATH."""
    path = host / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def bootstrap(host: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [host / "stack" / "bootstrap"],
        env={"PATH": str(host / "bin"), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def add_tools(host: Path, *names: str) -> None:
    """Put programs of this machine on PATH."""
    for name in names:
        found = shutil.which(name)
        assert found
        (host / "bin" / name).symlink_to(found)


def only_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What it says before it gives up."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def test_without_any_python_it_says_what_to_install(host: Path) -> None:
    sentence = only_sentence(bootstrap(host))
    assert sentence.startswith("error: Python 3.11 or newer is needed")
    assert "apt-get install python3 python3-venv" in sentence


@pytest.mark.parametrize("name", ["python3", "python"])
def test_a_python_that_is_too_old_is_as_good_as_none(host: Path, name: str) -> None:
    give(host, name, OLD)
    assert only_sentence(bootstrap(host)).startswith("error: Python 3.11 or newer is needed")
    assert not (host / ".venv").exists()


@pytest.mark.parametrize("missing", ["ensurepip", "venv"])
def test_where_venv_is_a_package_of_its_own_that_is_named(host: Path, missing: str) -> None:
    # The real Python, without the module that Debian splits off.
    (host / "split-off").mkdir()
    (host / "split-off" / f"{missing}.py").write_text("raise ModuleNotFoundError")
    path, python = shlex.quote(str(host / "split-off")), shlex.quote(sys.executable)
    give(host, "python3", f'PYTHONPATH={path} exec {python} "$@"\n')
    sentence = only_sentence(bootstrap(host))
    assert sentence == (
        f"error: {host / 'bin' / 'python3'} cannot make virtual environments, because Debian split that off; "
        "install it: apt-get install python3-venv"
    )
    assert not (host / ".venv").exists()


def test_a_python_that_is_new_enough_is_found_beside_one_that_is_not(host: Path) -> None:
    give(host, "python3", OLD)
    # It gets as far as the test needs: the next question is asked of the newer one.
    give(host, "python3.12", 'case "$2" in *version_info*) exit 0 ;; esac\nexit 1\n')
    assert f"{host / 'bin' / 'python3.12'} cannot make virtual environments" in only_sentence(bootstrap(host))


@pytest.mark.slow
def test_without_a_way_to_the_package_index_that_is_said(host: Path) -> None:
    add_tools(host, "rm", "mkdir", "cp", "touch")
    (host / "requirements").mkdir()
    shutil.copy2(ROOT / "requirements" / "uv.lock", host / "requirements" / "uv.lock")
    give(host, "python3", f'exec {shlex.quote(sys.executable)} "$@"\n')
    # Port 9 throws away what it gets, where anybody listens there at all.
    done = bootstrap(host, PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="0", PIP_NO_CACHE_DIR="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: uv could not be installed into .venv: see pip's message above; behind a proxy, set HTTPS_PROXY or "
        "PIP_INDEX_URL"
    )
    assert not (host / ".venv" / "ready").exists()
