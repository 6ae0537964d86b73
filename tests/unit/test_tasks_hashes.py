"""services.tasks.hashes"""

import hashlib
import logging
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


@pytest.mark.parametrize("rounds", [1, 2, 2 * CHUNK_ROUNDS + 1])
def test_a_chain_hashes_the_seed_and_then_the_digits_of_each_hash(rounds: int) -> None:
    digest = "seed"
    for _ in range(rounds):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    assert hash_chain("seed", rounds) == digest


@given(seed=st.text(st.characters(codec="utf-8")), first=st.integers(1, 50), second=st.integers(1, 50))
def test_a_chain_goes_on_from_its_end(seed: str, first: int, second: int) -> None:
    assert hash_chain(hash_chain(seed, first), second) == hash_chain(seed, first + second)


@pytest.mark.parametrize("rounds", [-1, 0, MAX_ROUNDS + 1])
def test_a_chain_refuses_rounds_out_of_bounds(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds must be from 1 to {MAX_ROUNDS}, not {rounds}"):
        hash_chain("seed", rounds)


# All chunks of the longer one together take a fraction of a second, so only the first is reported.
@pytest.mark.parametrize(("rounds", "done"), [(CHUNK_ROUNDS - 1, CHUNK_ROUNDS - 1), (5 * CHUNK_ROUNDS, CHUNK_ROUNDS)])
def test_progress_is_reported_once_a_second_under_the_id_of_the_task(app: Celery, rounds: int, done: int) -> None:
    # Applied in this process, the task leaves its result to us and its last report in the backend.
    result = hash_chain.apply(args=("seed", rounds), task_id="a-chain")
    assert result.get() == hash_chain("seed", rounds)
    seen = app.AsyncResult("a-chain")
    assert (seen.state, seen.info) == ("PROGRESS", {"done": done, "total": rounds})


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
    assert any(
        record.levelno == logging.WARNING and "stopped by the time limit after" in record.getMessage()
        for record in caplog.records
    )


def test_a_throttle_is_ready_at_once_and_then_once_per_interval() -> None:
    times = iter([10.0, 10.5, 10.999, 11.0, 11.5, 99.0, 99.5])
    throttle = Throttle(1.0, clock=lambda: next(times))
    assert [throttle.ready() for _ in range(7)] == [True, False, False, True, False, True, False]
