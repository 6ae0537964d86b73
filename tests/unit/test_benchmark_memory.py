"""benchmarks: what memory a process has, and what breaks a bound."""

import os

import pytest

from benchmarks import footprint
from benchmarks.footprint import KIB, MIB, Figure, Footprint, Reading
from benchmarks.memory.__main__ import kinds, steps
from benchmarks.memory.site import split

SMAPS = """5595df2b8000-7ffdba64f000 ---p 00000000 00:00 0                          [rollup]
Rss:               61780 kB
Pss:               30450 kB
Pss_Anon:          20112 kB
Pss_File:          10308 kB
Pss_Shmem:            30 kB
Anonymous:         40112 kB
Swap:                900 kB
SwapPss:             300 kB
"""


def reading(**processes: int) -> Reading:
    return Reading({int(pid[1:]): Footprint(own * MIB, 50 * MIB, 0) for pid, own in processes.items()})


def test_a_process_has_its_share_of_what_is_no_file_and_what_was_swapped_out() -> None:
    assert footprint.footprint(SMAPS) == Footprint((20112 + 30 + 300) * KIB, (40112 + 900) * KIB, 10308 * KIB)
    # A kernel that tells no shares.
    with pytest.raises(KeyError):
        footprint.footprint("Rss:   61780 kB\nPss:   30450 kB\n")


def test_this_process_has_memory_and_one_that_is_gone_has_none() -> None:
    # Beyond the largest number that Linux gives to a process.
    found = footprint.read([os.getpid(), 2**22 + 1])
    assert list(found.processes) == [os.getpid()]
    assert found.own > MIB


def test_a_tree_takes_what_its_processes_take() -> None:
    assert reading(p1=40, p2=25, p3=25).own == 90 * MIB


@pytest.mark.parametrize(
    ("figure", "kept"),
    [
        (footprint.growth("node", 100 * MIB, 110 * MIB - 1, 10 * MIB), True),
        (footprint.growth("node", 100 * MIB, 110 * MIB, 10 * MIB), False),
        (footprint.growth("node", 100 * MIB, 50 * MIB, 10 * MIB), True),
        (footprint.change("node", 100 * MIB, 110 * MIB, 10 * MIB), False),
        (footprint.change("node", 100 * MIB, 90 * MIB, 10 * MIB), False),
        (footprint.exactly("results", 1001, 1000), False),
    ],
)
def test_growth_differences_and_counts_are_bounded_and_shrinking_is_welcome(figure: Figure, kept: bool) -> None:
    assert figure.kept is kept


def test_a_child_that_was_replaced_is_told() -> None:
    lines = [figure.seen for figure in footprint.of_each(reading(p1=40, p2=25), reading(p1=41, p3=30))]
    first, *others = lines
    assert first == "40.00 MiB → 41.00 MiB (+1.00 MiB); if it shared nothing, +0.00 MiB"
    assert others == ["25.00 MiB, then it ended", "came later, 30.00 MiB"]


def test_a_broken_bound_is_a_sentence_and_stands_out_in_the_table() -> None:
    figures = [Figure("node", "1 MiB"), footprint.growth("growth", 0, 20 * MIB, 10 * MIB)]
    assert footprint.breaches(figures) == ["growth: +20.00 MiB, and the bound is < 10 MiB"]
    assert "| growth | +20.00 MiB | < 10 MiB: **broken** |" in footprint.table(figures)


def test_there_is_a_line_for_every_so_many_tasks_and_for_the_last() -> None:
    assert steps(0, 250, 100) == [100, 200, 250]
    assert steps(100, 200, 100) == [200]
    assert steps(10, 50, 100) == [50]


def test_producers_share_the_work_and_none_is_started_for_nothing() -> None:
    assert split(10, 3) == [4, 3, 3]
    assert split(1, 2) == [1]


def test_marks_of_publishing_threads_are_counted_not_listed() -> None:
    assert kinds(["celery", "published:a", "published:b"]) == "`celery`, `published:…` (2)"
    assert kinds([]) == "none"
