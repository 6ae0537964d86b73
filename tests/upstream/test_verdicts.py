"""What the lists make of a test's end: each that is not as listed is a failure, by its name."""

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


BAD, OTHER, WAYS = "test_a.py::test_bad", "test_a.py::test_ways[other]", "test_a.py::test_ways"


@pytest.mark.parametrize(
    ("lists", "code", "line"),
    [
        ({"differs": {BAD: "bad", OTHER: "other"}}, 0, "2 passed, 2 xfailed"),
        ({"differs": {BAD: "bad"}}, 1, f"FAILED {HOME}{OTHER}"),
        ({"differs": {BAD: "bad", WAYS: "both"}}, 1, "XPASS(strict)] both"),
        ({"may_differ": {BAD: "bad", WAYS: "both"}}, 0, "1 passed, 2 xfailed, 1 xpassed"),
        ({"left_out": {BAD: "for a reason", "[other]": "another way"}}, 0, "2 passed, 2 skipped"),
    ],
    ids=["all listed", "one not listed", "one passes", "one passes and may", "left out"],
)
def test_what_is_listed_may_fail_or_is_left_out_and_nothing_else(
    tmp_path: Path, lists: dict[str, dict[str, str]], code: int, line: str
) -> None:
    done = run(tmp_path, TESTS, **lists)
    assert (done.returncode, line in done.stdout) == (code, True), done.stdout
    # A test that does not run says why.
    assert ("for a reason" in done.stdout) is ("left_out" in lists)


def test_a_name_that_is_no_test_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS, differs={BAD: "bad", "test_a.py::test_gone": "gone", "test_b.py": "b"})
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
    bad = {BAD: "bad", OTHER: "other"}
    ends = [run(tmp_path / part[0], TESTS, f"--part={part}", differs=bad).stdout for part in ("1/3", "2/3", "3/3")]
    assert ["1 passed, 1 xfailed" in ends[0], "1 xfailed" in ends[1], "1 passed" in ends[2]] == [True] * 3, ends
