"""services.tasks.hashes"""

import hashlib
import logging
import signal
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.contrib.testing.app import TestApp, setup_default_app
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st

from services.tasks.hashes import CHUNK_ROUNDS, MAX_ROUNDS, Throttle, hash_chain


@pytest.fixture
def app() -> Iterator[Celery]:
    """An application whose broker and results live in this process."""
    app = TestApp(set_as_current=True)
    with setup_default_app(app):
        app.set_current()
        yield app


def test_a_chain_of_one_is_the_hash_of_the_seed() -> None:
    assert hash_chain("seed", 1) == hashlib.sha256(b"seed").hexdigest()


def test_every_round_hashes_the_digits_of_the_last() -> None:
    first = hashlib.sha256(b"seed").hexdigest()
    assert hash_chain("seed", 2) == hashlib.sha256(first.encode()).hexdigest()


@given(seed=st.text(st.characters(codec="utf-8")), first=st.integers(1, 50), second=st.integers(1, 50))
def test_a_chain_goes_on_from_its_end(seed: str, first: int, second: int) -> None:
    assert hash_chain(hash_chain(seed, first), second) == hash_chain(seed, first + second)


def test_a_chain_longer_than_a_chunk_has_all_its_rounds() -> None:
    digest = "seed"
    for _ in range(2 * CHUNK_ROUNDS + 1):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    assert hash_chain("seed", 2 * CHUNK_ROUNDS + 1) == digest


@pytest.mark.parametrize("rounds", [-1, 0, MAX_ROUNDS + 1])
def test_a_chain_refuses_rounds_out_of_bounds(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds must be from 1 to {MAX_ROUNDS}, not {rounds}"):
        hash_chain("seed", rounds)


def test_progress_can_be_read_by_the_id_of_the_task(app: Celery) -> None:
    # Applied in this process, the task leaves its result to us and its last report in the backend.
    result = hash_chain.apply(args=("seed", CHUNK_ROUNDS - 1), task_id="a-chain")
    assert result.get() == hash_chain("seed", CHUNK_ROUNDS - 1)
    seen = app.AsyncResult("a-chain")
    assert seen.state == "PROGRESS"
    assert seen.info == {"done": CHUNK_ROUNDS - 1, "total": CHUNK_ROUNDS - 1}


def test_reports_are_at_least_a_second_apart(app: Celery) -> None:
    # All of these chunks together take a fraction of a second, so only the first is reported.
    hash_chain.apply(args=("seed", 5 * CHUNK_ROUNDS), task_id="a-chain")
    assert app.AsyncResult("a-chain").info == {"done": CHUNK_ROUNDS, "total": 5 * CHUNK_ROUNDS}


def test_the_soft_time_limit_fails_the_task(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit_reached(*_: object) -> None:
        # What a worker process of Celery does on this signal.
        raise SoftTimeLimitExceeded

    def report_and_reach_it(**_: object) -> None:
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(hash_chain, "update_state", report_and_reach_it)
    before = signal.signal(signal.SIGALRM, limit_reached)
    try:
        result = hash_chain.apply(args=("seed", MAX_ROUNDS))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert result.state == "FAILURE"
    assert isinstance(result.result, SoftTimeLimitExceeded)
    assert any(
        record.levelno == logging.WARNING and "stopped by the time limit after" in record.getMessage()
        for record in caplog.records
    )


def test_a_throttle_is_ready_at_once_and_then_once_per_interval() -> None:
    times = iter([10.0, 10.5, 10.999, 11.0, 11.5, 99.0, 99.5])
    throttle = Throttle(1.0, clock=lambda: next(times))
    assert [throttle.ready() for _ in range(7)] == [True, False, False, True, False, True, False]
