"""services.tasks.arithmetic"""

import logging
from datetime import UTC, datetime

import pytest

from services.tasks.arithmetic import add


def test_add_returns_the_sum() -> None:
    assert add(4, 3) == 7
    assert add(0.5, -2) == -1.5


def test_add_logs_the_time_in_utc_and_the_sum(caplog: pytest.LogCaptureFixture) -> None:
    before = datetime.now(UTC)
    with caplog.at_level(logging.INFO):
        add(4, 3)
    time, total = caplog.messages[-1].split(" ")
    assert before <= datetime.fromisoformat(time) <= datetime.now(UTC)
    assert time.endswith("+00:00")
    assert total == "sum=7"


def test_add_refuses_what_cannot_be_added() -> None:
    with pytest.raises(TypeError):
        add(4, "3")
