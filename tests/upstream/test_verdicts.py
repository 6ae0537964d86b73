"""What the lists make of a test's end: each that is not as listed is a failure, by its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.upstream.sources import ROOT
from tests.upstream.suites import HOME

# They guard lists of slow tests.
pytestmark = pytest.mark.slow
TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert not "as it should be"
@pytest.mark.parametrize("way", ["one", "other"])
def test_ways(way): assert way == "one"
"""
HANGS = """
import time

def test_hangs():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass
def test_after(): pass
"""
# A program that imports pytest, kombu and little else, on a busy machine.
SECONDS = 120


def run(directory: Path, tests: str, *options: str, **lists: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run these tests with these lists."""
    (directory / HOME).mkdir(parents=True)
    (directory / HOME / "test_a.py").write_text(tests)
    entries = [
        f"[[{name}]]\nwhy = '{why}'\ntests = ['{test}']\n"
        for name, listed in lists.items()
        for test, why in listed.items()
    ]
    (directory / "lists.toml").write_text("package = 'a'\nconfig = ''\n" + "".join(entries))
    plugins = ["-p", "no:cacheprovider", "-p", "tests.upstream.verdicts", "--suite=lists.toml"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfEsxX", *plugins, *options, f"{HOME}test_a.py"],
        cwd=directory,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_what_is_listed_may_fail_and_nothing_else(tmp_path: Path) -> None:
    lists = {"test_a.py::test_bad": "bad", "test_a.py::test_ways[other]": "other"}
    done = run(tmp_path, TESTS, differs=lists)
    assert (done.returncode, "2 passed, 2 xfailed" in done.stdout) == (0, True), done.stdout
    done = run(tmp_path / "less", TESTS, differs={"test_a.py::test_bad": "bad"})
    assert (done.returncode, "FAILED t/integration/test_a.py::test_ways[other]" in done.stdout) == (1, True), (
        done.stdout
    )


def test_what_is_listed_and_passes_fails_unless_it_only_may(tmp_path: Path) -> None:
    lists = {"test_a.py::test_bad": "bad", "test_a.py::test_ways": "both"}
    done = run(tmp_path, TESTS, differs=lists)
    assert (done.returncode, "XPASS(strict)] both" in done.stdout) == (1, True), done.stdout
    done = run(tmp_path / "may", TESTS, may_differ=lists)
    assert (done.returncode, "1 passed, 2 xfailed, 1 xpassed" in done.stdout) == (0, True), done.stdout


def test_what_is_left_out_does_not_run_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS, left_out={"test_a.py::test_bad": "for a reason", "[other]": "another way"})
    assert (done.returncode, "2 passed, 2 skipped" in done.stdout) == (0, True), done.stdout
    assert "for a reason" in done.stdout


def test_a_name_that_is_no_test_is_refused(tmp_path: Path) -> None:
    done = run(
        tmp_path, TESTS, differs={"test_a.py::test_bad": "bad", "test_a.py::test_gone": "gone", "test_b.py": "b"}
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert "test_a.py::test_gone is listed for a and is none of its tests" in done.stderr


@pytest.mark.parametrize("lists", [{}, {"differs": {"test_a.py::test_hangs": "bad"}}], ids=["", "listed"])
def test_a_test_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, lists: dict[str, dict[str, str]]) -> None:
    done = run(tmp_path, HANGS, "--test-seconds=5", **lists)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "it took longer than 5 s" in done.stdout
    # Where it was, for somebody who asks why.
    assert "in test_hangs" in done.stderr


def test_the_parts_of_a_suite_are_all_of_it(tmp_path: Path) -> None:
    bad = {"test_a.py::test_bad": "bad", "test_a.py::test_ways[other]": "other"}
    ends = [run(tmp_path / part[0], TESTS, f"--part={part}", differs=bad).stdout for part in ("1/3", "2/3", "3/3")]
    assert ["1 passed, 1 xfailed" in ends[0], "1 xfailed" in ends[1], "1 passed" in ends[2]] == [True] * 3, ends
