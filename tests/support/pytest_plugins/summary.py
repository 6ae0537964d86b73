"""Add to pytest's summary how long each part took."""

from collections import defaultdict
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Tests, how many of them were skipped, their time added up, and when the last one ended, for each directory."""
    reports = [report for found in terminalreporter.stats.values() for report in found if is_of_a_test(report)]
    parts: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
    for report in reports:
        parts[Path(report.nodeid).parts[1]].append(report)
    if not parts:
        return
    began = min(report.start for report in reports)
    terminalreporter.section("parts")
    for name, found in sorted(parts.items()):
        tests, seconds = len({report.nodeid for report in found}), sum(report.duration for report in found)
        skipped, ended = sum(report.skipped for report in found), max(report.stop for report in found) - began
        terminalreporter.line(
            f"{name:12} {tests:5} tests, {skipped:3} skipped, {seconds:6.0f} s of work, done after {ended:4.0f} s"
        )


def is_of_a_test(report: object) -> bool:
    return isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/")
