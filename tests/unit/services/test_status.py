"""services.commands.status: what `make status` says in a sentence."""

from typing import Any

import pytest

from services.commands.status import find_problems
from tests.support.documents import ROOT

UNREAD = "see docs/operations.md#tasks-that-nobody-reads"
NODES: dict[str, Any] = {"node0@here": {"running": []}}
LATE = {"node": "node0@here", "id": "7", "name": "shop.pack", "limit": 1.5, "seconds": 90}


def state(**given: Any) -> dict[str, Any]:
    """A stack in which all is well, but for what is given."""
    return {"nodes": NODES, "silent_nodes": 0, "queues": {"celery": 2}, "unread": [], "overtime": [], **given}


def unread(queue: str, priority: int, waiting: int) -> dict[str, Any]:
    return {"unread": [{"queue": queue, "priority": priority, "waiting": waiting}]}


@pytest.mark.parametrize(
    ("given", "starting", "says"),
    [
        ({}, False, ""),
        ({"nodes": {}}, False, "No node answers; what waits: 2 in celery."),
        ({"nodes": {}, "queues": {"celery": 0}}, True, "No node answers yet; what waits: nothing."),
        (
            {"nodes": {}, "silent_nodes": 1},
            False,
            "Nodes that do not answer, such as a solo pool at work: 1. What they read is not known.",
        ),
        (unread("mial", 0, 1), False, f"No node reads mial: 1 task waits there, {UNREAD}"),
        (
            unread("io", 0, 2),
            True,
            f"No node reads io, unless a worker that starts does: 2 tasks wait there, {UNREAD}",
        ),
        (
            unread("celery", 1, 3),
            False,
            "No node reads celery, priority 1 (nodes read 0, which is the most urgent, 3, 6 and 9): 3 tasks wait "
            f"there, {UNREAD}",
        ),
        (
            {"overtime": [LATE]},
            False,
            "node0@here runs shop.pack[7] for 90 s, and its limit is 1.5 s: see docs/operations.md#time-limits",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_and_what_is_well_none(given: dict[str, Any], starting: bool, says: str) -> None:
    assert find_problems(state(**given), starting) == ([says] if says else [])


def test_the_document_has_the_sections_that_it_names() -> None:
    lines = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    assert {"## Tasks that nobody reads", "## Time limits"} <= set(lines)
