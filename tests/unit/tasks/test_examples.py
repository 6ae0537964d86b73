"""The example tasks but for those of pages; on a worker: tests/integration/results/test_tasks.py."""

import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from celery import Celery
from celery.contrib.testing.app import TestApp, setup_default_app
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import example, given
from hypothesis import strategies as st

from services.tasks import primes
from services.tasks.arithmetic import add
from services.tasks.disk import WARN_BELOW, is_short, report_free_space
from services.tasks.hashes import CHUNK_ROUNDS, MAX_ROUNDS, Throttle, hash_chain
from services.tasks.primes import MAX_LIMIT, count_primes
from services.tasks.words import count_document, merge_counts, word_count

# https://oeis.org/A006880, the small numbers where a sieve goes wrong, and a large prime, which counts itself.
PRIMES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 9: 4, 25: 9, 7918: 999, 7919: 1000, 10**4: 1229, 10**6: 78498, 10**7: 664579}
# No disk has more free space than its whole.
ALWAYS = 1.1
NEVER = 0.0


@pytest.fixture
def app() -> Iterator[Celery]:
    """An application whose broker and results live in this process."""
    app = TestApp(set_as_current=True)
    with setup_default_app(app):
        app.set_current()
        yield app


@pytest.mark.parametrize(
    ("task", "arguments", "result"),
    [
        (add, [4, 3], 7),
        (add, [0.5, -2], -1.5),
        *((count_primes, [limit], count) for limit, count in PRIMES.items()),
        (count_document, [""], {}),
        (count_document, ["To be, or not to be."], {"to": 2, "be": 2, "or": 1, "not": 1}),
        (count_document, ["Don't 'quote' don\u2019t"], {"don't": 1, "quote": 1, "don\u2019t": 1}),
        (count_document, ["4 apples, apples_4"], {"apples": 2}),
        (count_document, ["Straße STRASSE"], {"strasse": 2}),
        (count_document, ["caf\u00e9 cafe\u0301 CAF\u00c9"], {"caf\u00e9": 3}),
        # A tenth of the disk is free, or less, or there is no disk.
        (is_short, [99, 1000, WARN_BELOW], True),
        (is_short, [100, 1000, WARN_BELOW], False),
        (is_short, [0, 1000, WARN_BELOW], True),
        (is_short, [0, 0, WARN_BELOW], False),
    ],
)
def test_a_result_is_the_known_one(task: Callable[..., object], arguments: list[object], result: object) -> None:
    assert task(*arguments) == result


@pytest.mark.parametrize(
    ("task", "arguments", "error", "says"),
    [
        (add, [4, "3"], TypeError, None),
        *((count_primes, [limit], TypeError, None) for limit in (10.5, "10", None)),
        *(
            (count_primes, [limit], ValueError, f"limit must be from 0 to {MAX_LIMIT}, not {limit}")
            for limit in (-1, MAX_LIMIT + 1)
        ),
        *(
            (hash_chain, ["seed", rounds], ValueError, f"rounds must be from 1 to {MAX_ROUNDS}, not {rounds}")
            for rounds in (-1, 0, MAX_ROUNDS + 1)
        ),
        (report_free_space, [["/no such path"]], FileNotFoundError, "/no such path"),
    ],
)
def test_what_a_task_cannot_work_with_is_refused(
    task: Callable[..., object], arguments: list[object], error: type[Exception], says: str | None
) -> None:
    with pytest.raises(error, match=says):
        task(*arguments)


def test_add_logs_the_time_in_utc_and_the_sum(caplog: pytest.LogCaptureFixture) -> None:
    before = datetime.now(UTC)
    with caplog.at_level(logging.INFO):
        add(4, 3)
    time, total = caplog.messages[-1].split(" ")
    assert before <= datetime.fromisoformat(time) <= datetime.now(UTC)
    assert time.endswith("+00:00")
    assert total == "sum=7"


def test_the_report_has_the_bytes_of_each_path_and_warns_of_none_with_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Through JSON, as its result is stored.
    report = json.loads(json.dumps(report_free_space([str(tmp_path), "/"], warn_below=NEVER)))
    assert list(report) == [str(tmp_path), "/"]
    assert report["/"]["total"] == shutil.disk_usage("/").total
    assert 0 <= report["/"]["free"] <= report["/"]["total"]
    assert caplog.records == []


def test_a_short_disk_is_warned_about_by_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report_free_space([str(tmp_path)], warn_below=ALWAYS)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{tmp_path} has ")


def is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@given(limit=st.integers(0, 3000), size=st.integers(1, 200))
def test_segments_of_any_size_mark_exactly_the_odd_primes(limit: int, size: int) -> None:
    marks = b"".join(primes._segments(limit, size))
    assert [bool(mark) for mark in marks] == [is_prime(number) for number in range(3, limit + 1, 2)]


def test_merged_counts_have_the_most_frequent_word_first() -> None:
    merged = merge_counts([{"b": 1, "rare": 1}, {"b": 1, "a": 2}])
    assert list(merged.items()) == [("a", 2), ("b", 2), ("rare", 1)]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers(1, 9), max_size=5), max_size=5))
def test_merging_keeps_every_count(counts: list[dict[str, int]]) -> None:
    assert merge_counts(counts) == sum((Counter(count) for count in counts), Counter())


def test_the_workflow_is_a_group_of_counts_and_their_merge() -> None:
    workflow = word_count(["a", "b"])
    assert [(task.task, task.args) for task in workflow.tasks] == [(count_document.name, (text,)) for text in "ab"]
    assert workflow.body.task == merge_counts.name


@given(seed=st.text(st.characters(codec="utf-8")), first=st.integers(1, 50), second=st.integers(1, 50))
@example("seed", 1, 2 * CHUNK_ROUNDS)
def test_a_chain_hashes_the_seed_and_then_the_digits_of_each_hash(seed: str, first: int, second: int) -> None:
    digest = seed
    for _ in range(first + second):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    assert hash_chain(seed, first + second) == hash_chain(hash_chain(seed, first), second) == digest


# All chunks of the longer one together take a fraction of a second, so only the first is reported.
@pytest.mark.parametrize(("rounds", "done"), [(CHUNK_ROUNDS - 1, CHUNK_ROUNDS - 1), (5 * CHUNK_ROUNDS, CHUNK_ROUNDS)])
def test_progress_is_reported_once_a_second_under_the_id_of_the_task(app: Celery, rounds: int, done: int) -> None:
    # Applied in this process, the task leaves its result to us and its last report in the backend.
    result = hash_chain.apply(args=("seed", rounds), task_id="a-chain")
    assert result.get() == hash_chain("seed", rounds)
    reported = app.AsyncResult("a-chain")
    assert (reported.state, reported.info) == ("PROGRESS", {"done": done, "total": rounds})


def test_the_soft_time_limit_fails_the_task(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reach_limit(**_: object) -> None:
        raise SoftTimeLimitExceeded

    # A worker process raises it in whatever its task does at that moment: here, in its first report.
    monkeypatch.setattr(hash_chain, "update_state", reach_limit)
    result = hash_chain.apply(args=("seed", MAX_ROUNDS))
    assert result.state == "FAILURE"
    assert isinstance(result.result, SoftTimeLimitExceeded)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("stopped by the time limit after" in warning for warning in warnings)


def test_a_throttle_is_ready_at_once_and_then_once_per_interval() -> None:
    times = iter([10.0, 10.5, 10.999, 11.0, 11.5, 99.0, 99.5])
    throttle = Throttle(1.0, clock=lambda: next(times))
    assert [throttle.ready() for _ in range(7)] == [True, False, False, True, False, True, False]
