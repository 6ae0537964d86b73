"""services.tasks.words; on a worker: tests/integration/results/test_tasks.py"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tasks.words import count_document, merge_counts, word_count


@pytest.mark.parametrize(
    ("document", "counts"),
    [
        ("", {}),
        ("To be, or not to be.", {"to": 2, "be": 2, "or": 1, "not": 1}),
        ("Don't 'quote' don\u2019t", {"don't": 1, "quote": 1, "don\u2019t": 1}),
        ("4 apples, apples_4", {"apples": 2}),
        ("Straße STRASSE", {"strasse": 2}),
        ("caf\u00e9 cafe\u0301 CAF\u00c9", {"caf\u00e9": 3}),
    ],
)
def test_a_document_is_counted_by_its_words(document: str, counts: dict[str, int]) -> None:
    assert count_document(document) == counts


def test_merged_counts_have_the_most_frequent_word_first() -> None:
    merged = merge_counts([{"b": 1, "rare": 1}, {"b": 1, "a": 2}])
    assert list(merged.items()) == [("a", 2), ("b", 2), ("rare", 1)]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(1, 9), max_size=5), max_size=5))
def test_merging_keeps_every_count(counts: list[dict[str, int]]) -> None:
    assert merge_counts(counts) == sum((Counter(count) for count in counts), Counter())


def test_the_workflow_is_a_group_of_counts_and_their_merge() -> None:
    workflow = word_count(["a", "b"])
    assert [(task.task, task.args) for task in workflow.tasks] == [
        (count_document.name, ("a",)),
        (count_document.name, ("b",)),
    ]
    assert workflow.body.task == merge_counts.name
