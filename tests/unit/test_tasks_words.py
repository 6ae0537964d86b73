"""services.tasks.words"""

from collections import Counter
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.contrib.testing.app import TestApp, setup_default_app
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError
from celery.signals import setup_logging
from hypothesis import given
from hypothesis import strategies as st

from services.tasks.words import count_document, count_words, merge_counts, word_count

# Seconds: what takes longer than this in one process, with no network, hangs.
PATIENCE = 120


@pytest.fixture(scope="module")
def worker() -> Iterator[Celery]:
    """A worker in a thread of this process, its broker and results in memory."""
    # In seconds: a second, the default of the transport in memory, would be spent by every test.
    app = TestApp(set_as_current=True, config={"broker_transport_options": {"polling_interval": 0.01}})
    with setup_default_app(app):
        app.set_current()
        # A thread of its own has no current application, only the default one.
        app.set_default()
        # Logs are set up by whoever hears this: else a worker changes those of all other tests in this process.
        setup_logging.connect(leave_logs)
        with start_worker(app, perform_ping_check=False, shutdown_timeout=PATIENCE):
            yield app
        setup_logging.disconnect(leave_logs)


def leave_logs(**_: object) -> None:
    """Set up nothing."""


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


@pytest.mark.parametrize(
    ("documents", "counts"),
    [
        ([], {}),
        (["one document"], {"document": 1, "one": 1}),
        (["a b", "b c", "b"], {"b": 3, "a": 1, "c": 1}),
    ],
)
def test_the_id_of_count_words_yields_the_merged_counts(
    worker: Celery, documents: list[str], counts: dict[str, int]
) -> None:
    assert count_words.delay(documents).get(timeout=PATIENCE, interval=0.01) == counts


def test_a_document_that_cannot_be_counted_fails_the_whole(worker: Celery) -> None:
    with pytest.raises(ChordError):
        count_words.delay(["fine", None]).get(timeout=PATIENCE, interval=0.01)


def test_the_workflow_can_be_sent_without_its_task(worker: Celery) -> None:
    assert word_count(["a b", "b"]).delay().get(timeout=PATIENCE, interval=0.01) == {"b": 2, "a": 1}
