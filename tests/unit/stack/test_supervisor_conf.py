"""stack.local.supervisor_conf: which changes only a new Supervisor takes up, and what a Supervisor loads."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import load
from stack.local import supervisor_conf
from stack.paths import ROOT

PRINT_LOADED = """
import sys
from services.supervisor import supervise
for name, module in sys.modules.items():
    print(name.partition(".")[0], getattr(module, "__file__", None), sep="\\t")
"""


@pytest.fixture(scope="module")
def loaded() -> list[tuple[str, str]]:
    """Package and file of each module that supervisord has loaded once it runs."""
    command = [sys.executable, "-c", PRINT_LOADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return [(package, file) for package, file in (line.split("\t") for line in done.stdout.splitlines())]


def test_supervisord_carries_nothing_of_celery_in_memory(loaded: list[tuple[str, str]]) -> None:
    packages = {package for package, _ in loaded}
    assert "supervisor" in packages
    assert not packages & {"celery", "kombu", "billiard", "redis", "pydantic", "config"}


def test_a_change_of_any_module_that_supervisord_has_loaded_is_seen(
    loaded: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load({})
    copy = tmp_path / supervisor_conf.PLUG_IN.relative_to(ROOT)
    shutil.copytree(supervisor_conf.PLUG_IN, copy)
    monkeypatch.setattr(supervisor_conf, "PLUG_IN", copy)
    ours = [Path(file).relative_to(ROOT) for package, file in loaded if package in ("services", "stack")]
    assert Path("services/supervisor/watchdog.py") in ours
    for file in ours:
        if file == Path("services/__init__.py"):
            # A docstring alone.
            continue
        before = supervisor_conf.hash_own_parts(settings)
        with (tmp_path / file).open("a") as source:
            source.write("# changed\n")
        assert supervisor_conf.hash_own_parts(settings) != before, file


def test_another_number_of_workers_needs_no_new_supervisor() -> None:
    assert supervisor_conf.hash_own_parts(load({"WORKERS": "5"})) == supervisor_conf.hash_own_parts(load({}))
