"""The arithmetic of benchmarks/cost, and what it reads from the kernel and from Redis."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident

import pytest
from click.testing import CliRunner

from benchmarks.cost import figures, starts
from benchmarks.cost.__main__ import Pair, main, row
from benchmarks.cost.commands import count_calls, count_from_outside
from benchmarks.cost.figures import FIGURES, Figure, Measurement, Summary
from benchmarks.cost.proc import cpu_seconds
from services.supervisor.proc_stat import parse_stat

MORE, LESS = Figure("throughput", "throughput", more_is_better=True), Figure("memory", "memory")


def measurement(value: float) -> Measurement:
    return Measurement(*[value] * len(FIGURES))


def test_a_rate_leaves_out_the_first_tenth() -> None:
    # The first two of 20 take a second each, the others 10 ms.
    times = [0.0, 1.0, *(2.0 + 0.01 * step for step in range(18))]
    assert figures.rate(times) == pytest.approx(100)


def test_a_summary_tells_median_range_and_spread() -> None:
    found = figures.summarize([4.0, 2.0, 3.0])
    assert found == Summary(median=3, least=2, most=4)
    assert (found.spread, figures.summarize([0.0, 1.0]).spread) == (2, math.inf)
    assert figures.format_summary(found) == "3.00 (2.00 to 4.00)"
    with pytest.raises(ValueError, match="nothing was measured"):
        figures.summarize([])


@pytest.mark.parametrize(("part", "expected"), [(50, 50), (99, 99), (100, 100), (0.1, 1)])
def test_a_percentile_is_one_of_the_values(part: float, expected: float) -> None:
    assert figures.percentile(range(100, 0, -1), part) == expected


def test_a_ratio_is_that_of_a_pair_and_a_baseline_of_zero_has_none() -> None:
    assert figures.ratios([2.0, 4.0, 0.0], [1.0, 8.0, 1.0]) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("figure", "slowest", "ratios", "verdict"),
    [
        (MORE, 1.1, [1.1, 1.2, 0.9, 1.0], "better in 2 of 4"),
        (LESS, 1.1, [1.1, 1.2, 0.9, 1.0], "better in 1 of 4"),
        (MORE, 1.5, [9.0, 9.0], "better in 2 of 2"),
        (MORE, 1.6, [9.0, 9.0], "none: stock itself spreads 1.60 times"),
    ],
)
def test_a_verdict_counts_the_pairs_that_are_better_than_a_steady_baseline(
    figure: Figure, slowest: float, ratios: list[float], verdict: str
) -> None:
    assert figures.judge(figure, figures.summarize([1.0, slowest]), ratios) == verdict


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_a_number_is_shown_with_the_digits_that_count(value: float, expected: str) -> None:
    assert figures.format_number(value) == expected


def test_a_row_has_both_sides_and_their_ratio() -> None:
    pairs = [Pair(stock=measurement(2.0), stalk=measurement(4.0))]
    assert row(MORE, pairs) == (
        "throughput",
        "2.00 (2.00 to 2.00)",
        "4.00 (4.00 to 4.00)",
        "2.00 (2.00 to 2.00)",
        "better in 1 of 1",
    )


def test_each_figure_is_a_value_of_a_measurement() -> None:
    assert {figure.field for figure in FIGURES} == set(Measurement.__dataclass_fields__)


def test_cpu_is_read_behind_a_name_with_brackets_and_includes_children() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    # utime, stime, cutime and cstime are the fields 14 to 17.
    stat = parse_stat(f"7 (a) b) S {fields}")
    assert (stat.cpu, stat.children_cpu) == (14 + 15, 16 + 17)


def test_this_process_has_used_some_and_one_that_is_gone_nothing() -> None:
    assert cpu_seconds([os.getpid()]) > 0
    # Above the greatest that Linux gives.
    assert cpu_seconds([1 << 23]) == 0


def test_commands_are_counted_without_those_of_the_benchmark() -> None:
    calls = {"cmdstat_evalsha": 3, "cmdstat_zadd": 5, "cmdstat_info": 9}
    assert count_calls({name: {"calls": number} for name, number in calls.items()}) == 8


def test_a_command_inside_a_script_does_not_come_from_outside() -> None:
    output = (
        b'+OK\r\n+OK\r\n+1700000000.000001 [0 127.0.0.1:5000] "EVALSHA" "ab" "1" "celery"\r\n'
        b'+1700000000.000002 [0 lua] "LPUSH" "celery" "+1.0 [0 127.0.0.1:1] \\"x\\""\r\n'
        b'+1700000000.000003 [1 unix:/run/redis.sock] "SETEX" "a" "1" "b"\r\n'
        b'+1700000000.000004 [0 127.0.0.1:5001] "TYPE" "unacked"\r\n'
    )
    assert count_from_outside(output) == 2


def test_starts_are_counted_over_all_processes_and_one_without_room_is_an_error(tmp_path: Path) -> None:
    assert starts.count(tmp_path) == 0
    recorder = starts.Recorder(tmp_path, room=2)
    recorder.record()
    recorder.record()
    with pytest.raises(IndexError):
        recorder.record()
    (tmp_path / "another").write_bytes(starts.SLOT.pack(1) + starts.SLOT.pack(0.5))
    # Made, and not yet written to.
    (tmp_path / "empty").touch()
    assert starts.count(tmp_path) == 3
    found = starts.times(tmp_path)
    assert found == sorted(found)
    assert (len(found), found[0]) == (3, 0.5)


def test_threads_that_start_at_once_lose_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COST_STARTS", str(tmp_path))
    monkeypatch.setenv("COST_ROOM", "1")
    together = Barrier(8)

    def start() -> None:
        together.wait(60)
        starts.recorder(os.getpid(), get_ident()).record()

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(start) for _ in range(8)]:
            each.result(60)
    assert starts.count(tmp_path) == 8


@pytest.mark.parametrize("arguments", [["--pool", "gevent"], ["--pairs", "0"], ["--tasks", "1"], ["--nonsense"]])
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2
