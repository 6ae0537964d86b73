"""Add to pytest's summary how long each part took, and how many tests were skipped for which reason."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Add both to what pytest itself sums up."""
    reports = [report for found in terminalreporter.stats.values() for report in found if is_of_a_test(report)]
    write_parts(terminalreporter, reports)
    write_skips(terminalreporter, terminalreporter.stats.get("skipped", []))


def is_of_a_test(report: object) -> bool:
    return isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/")


def write_parts(terminal: TerminalReporter, reports: list[pytest.TestReport]) -> None:
    """Tests, how many of them were skipped, their time added up, and when the last one ended, for each directory."""
    parts: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
    for report in reports:
        parts[Path(report.nodeid).parts[1]].append(report)
    if not parts:
        return
    began = min(report.start for report in reports)
    terminal.section("parts")
    for name, found in sorted(parts.items()):
        tests, seconds = len({report.nodeid for report in found}), sum(report.duration for report in found)
        skipped, ended = sum(report.skipped for report in found), max(report.stop for report in found) - began
        terminal.line(
            f"{name:12} {tests:5} tests, {skipped:3} skipped, {seconds:6.0f} s of work, done after {ended:4.0f} s"
        )


def write_skips(terminal: TerminalReporter, skipped: list[pytest.TestReport]) -> None:
    """How many tests were skipped for which reason."""
    reasons = Counter(reason(report) for report in skipped)
    if not reasons:
        return
    terminal.section("skipped")
    for why, count in reasons.most_common():
        terminal.line(f"{count:5} {why}")


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    longrepr = report.longrepr
    return str(longrepr[2]).removeprefix("Skipped: ") if isinstance(longrepr, tuple) else str(longrepr)
