"""services.tasks.disk"""

import json
import logging
import shutil
from pathlib import Path

import pytest

from services.tasks.disk import WARN_BELOW, is_short, report_free_space

# No disk has more free space than its whole.
ALWAYS = 1.1
NEVER = 0.0


def test_the_report_has_the_bytes_of_each_path(tmp_path: Path) -> None:
    # Through JSON, as its result is stored.
    report = json.loads(json.dumps(report_free_space([str(tmp_path), "/"], warn_below=NEVER)))
    assert list(report) == [str(tmp_path), "/"]
    assert report["/"]["total"] == shutil.disk_usage("/").total
    assert 0 <= report["/"]["free"] <= report["/"]["total"]


def test_a_short_disk_is_warned_about_by_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report_free_space([str(tmp_path)], warn_below=ALWAYS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{tmp_path} has ")


def test_a_disk_with_room_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report_free_space([str(tmp_path)], warn_below=NEVER)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("free", "total", "short"),
    [(99, 1000, True), (100, 1000, False), (0, 1000, True), (0, 0, False)],
)
def test_a_disk_is_short_below_a_tenth(free: int, total: int, short: bool) -> None:
    assert is_short(free, total, WARN_BELOW) is short


def test_a_path_that_is_not_there_fails_the_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        report_free_space([str(tmp_path / "gone")])
