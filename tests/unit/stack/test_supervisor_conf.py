"""stack.local.supervisor_conf: by what a running Supervisor is told from one that has to be restarted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import load
from stack.local import supervisor_conf
from stack.paths import ROOT

PRINT_OURS = """
import sys
from services.supervisor import supervise
ours = ("config", "services", "stack")
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ours))
"""


def find_loaded() -> list[str]:
    """Files of this repository that supervisord has loaded once it runs, packages aside."""
    command = [sys.executable, "-c", PRINT_OURS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    files = [str(Path(file).relative_to(ROOT)) for file in done.stdout.split()]
    return sorted(file for file in files if not file.endswith("__init__.py"))


def test_supervisord_is_restarted_for_a_change_of_anything_that_it_has_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, loaded = load({}), find_loaded()
    assert "services/supervisor/watchdog.py" in loaded
    copy = tmp_path / supervisor_conf.PLUG_IN.relative_to(ROOT)
    shutil.copytree(supervisor_conf.PLUG_IN, copy)
    monkeypatch.setattr(supervisor_conf, "PLUG_IN", copy)
    for file in loaded:
        before = supervisor_conf.hash_own_parts(settings)
        with (tmp_path / file).open("a") as source:
            source.write("# changed\n")
        assert supervisor_conf.hash_own_parts(settings) != before, file
    assert supervisor_conf.hash_own_parts(settings) == supervisor_conf.hash_own_parts(settings)
    assert supervisor_conf.hash_own_parts(load({"WORKERS": "5"})) == supervisor_conf.hash_own_parts(settings)
