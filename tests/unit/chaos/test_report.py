"""The table of docs/chaos.md takes its last columns from outcomes that are kept, and says when they are out of date."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import stock_outcomes
from tests.chaos.faults import FAULTS
from tests.chaos.report import about, build_document, build_stock_cells, describe_kept
from tests.chaos.run import Outcome
from tests.chaos.stock_outcomes import Kept, Versions
from tests.chaos.subjects import POOLS
from tests.support.checkout import ROOT

HERE = Versions("5.7.0", "5.7.0", "7.0.15")
KEPT = Kept("poison", "solo", 1, 1770, 2, 3, 4, 1, "2026-11-22", "5.7.0", "5.7.0", "7.0.15")
OUTCOME = Outcome(
    fault="poison",
    pool="solo",
    subject="stock",
    seed=1,
    times=1,
    lease=5,
    sent=10,
    refused=0,
    executed=6,
    lost=["a", "b"],
    never_kept=[],
    waiting=["c"],
    parked=0,
    twice={"no cause": 3},
    recorded=0,
    worst=1.5,
    seconds=9,
    exits=["node1@stock exited with 1"],
    remarks=[],
)


def rows(document: str) -> dict[tuple[str, str], list[str]]:
    """The cells of a table's lines, by fault and pool."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if "|" in line]
    return {(cells[0], cells[1]): cells for cells in lines[2:]}


def test_the_document_shows_what_is_kept() -> None:
    shown = rows((ROOT / "docs" / "chaos.md").read_text())

    kept = {(about(each.fault), each.pool): build_stock_cells(each) for each in stock_outcomes.load()}
    # Stock workers beside Stalk's are a fault of Stalk's alone.
    assert len(kept) == sum(len(POOLS) for fault in FAULTS.values() if not fault.stalk_only)
    assert {key: cells[-4:] for key, cells in shown.items() if key in kept} == kept


def test_the_document_says_when_the_kept_outcomes_were_made() -> None:
    kept = stock_outcomes.load()
    assert {f"{each.date}, {each.versions}" for each in kept} and all(
        f"{each.date}, {each.versions}" in (ROOT / "docs" / "chaos.md").read_text() for each in kept
    )


def test_kept_outcomes_stand_beside_those_of_stalk() -> None:
    stalk = replace(OUTCOME, subject="stalk", lost=[], waiting=[], executed=10, twice={})
    cells = rows(build_document([stalk], [KEPT], "make chaos", 1))[about("poison"), "solo"]
    assert cells[2:5] == ["1", "10", "10"]
    assert cells[-4:] == ["1", "1770", "2 (3 still wait)", "4; 1 nodes exited"]


@pytest.mark.parametrize("here", [replace(HERE, celery="5.8.0"), replace(HERE, kombu="5.8.0")])
def test_outcomes_of_another_celery_or_kombu_are_said_to_be_so(here: Versions) -> None:
    said = describe_kept([KEPT], here)
    assert f"are of {HERE}, and here is {here}: `make chaos-stock`" in said


def test_outcomes_of_the_same_celery_and_kombu_stand_whatever_the_redis() -> None:
    said = describe_kept([KEPT], replace(HERE, redis="8.0.2"))
    assert said == f"kombu's own transport: `make chaos-stock`, 2026-11-22, {HERE}."


def test_an_outcome_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "stock.jsonl"
    for outcome in (OUTCOME, replace(OUTCOME, pool="threads"), replace(OUTCOME, sent=20, fault="poison")):
        stock_outcomes.keep(outcome, path)

    assert [(each.pool, each.sent) for each in stock_outcomes.load(path)] == [("threads", 10), ("solo", 20)]
    last = stock_outcomes.load(path)[1]
    assert (last.lost, last.waiting, last.twice) == (2, 1, 3)


def test_a_node_that_poison_has_ended_did_not_end_by_itself(tmp_path: Path) -> None:
    assert stock_outcomes.summarize(OUTCOME).exits == 0
    assert stock_outcomes.summarize(replace(OUTCOME, fault="redis_kill")).exits == 1
