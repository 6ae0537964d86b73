"""The table of docs/chaos.md takes its last columns from outcomes that are kept, and says when they are out of date."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import stock_outcomes
from tests.chaos.faults import FAULTS
from tests.chaos.report import build_document, build_stock_cells, describe_kept
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
    times=1,
    lease=5,
    sent=10,
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


def parse_rows(document: str) -> dict[tuple[str, str], list[str]]:
    """The cells of a table's lines, by fault and pool."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if "|" in line]
    return {(cells[0], cells[1]): cells for cells in lines[2:]}


def test_the_document_shows_what_is_kept_and_of_when_it_is() -> None:
    document = (ROOT / "docs" / "chaos.md").read_text()
    rows = parse_rows(document)

    kept = {(FAULTS[each.fault].about, each.pool): each for each in stock_outcomes.load()}
    # Stock workers beside Stalk's are a fault of Stalk's alone.
    assert len(kept) == sum(len(POOLS) for fault in FAULTS.values() if not fault.stalk_only) > 0
    for key, outcome in kept.items():
        assert rows[key][-4:] == build_stock_cells(outcome)
        assert f"{outcome.date}, {outcome.versions}" in document


def test_kept_outcomes_stand_beside_those_of_stalk() -> None:
    stalk = replace(OUTCOME, subject="stalk", lost=[], waiting=[], executed=10, twice={})
    cells = parse_rows(build_document([stalk], [KEPT], "make chaos", 1))[FAULTS["poison"].about, "solo"]
    assert cells[2:5] == ["1", "10", "10"]
    assert cells[-4:] == ["1", "1770", "2 (3 still wait)", "4; 1 nodes exited"]


@pytest.mark.parametrize(
    ("changed", "stale"), [({"celery": "5.8.0"}, True), ({"kombu": "5.8.0"}, True), ({"redis": "8"}, False)]
)
def test_outcomes_stand_until_celery_or_kombu_changes(changed: dict[str, str], stale: bool) -> None:
    here = HERE._replace(**changed)
    sentence = (
        f" Columns of kombu's own transport are of {HERE}, and here is {here}: `make chaos-stock` makes them anew."
    )
    expected = f"kombu's own transport: `make chaos-stock`, 2026-11-22, {HERE}." + sentence * stale
    assert describe_kept([KEPT], here) == expected


def test_an_outcome_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "stock.jsonl"
    for outcome in (OUTCOME, replace(OUTCOME, pool="threads"), replace(OUTCOME, sent=20)):
        stock_outcomes.keep(outcome, path)

    kept = [(each.pool, each.sent, each.lost, each.waiting, each.twice) for each in stock_outcomes.load(path)]
    assert kept == [("threads", 10, 2, 1, 3), ("solo", 20, 2, 1, 3)]


def test_a_node_that_poison_has_ended_did_not_end_by_itself() -> None:
    assert stock_outcomes.summarize(OUTCOME).exits == 0
    assert stock_outcomes.summarize(replace(OUTCOME, fault="redis_kill")).exits == 1
