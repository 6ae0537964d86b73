"""What keeps a node's memory from growing."""

from time import monotonic

import pytest
from celery import Celery, signals
from celery.result import allow_join_result
from kombu.asynchronous import get_event_loop, set_event_loop
from kombu.asynchronous.timer import Timer as KombuTimer

from services.worker.memory import MIN_ENTRIES, Timer, TimerStep

TASKS = 10 * MIN_ENTRIES
HOUR = 3600.0


# When kombu forgets them too, ours can go.
@pytest.mark.parametrize(("kind", "most"), [(Timer, MIN_ENTRIES), (KombuTimer, TASKS)])
def test_cancelled_timers_are_forgotten_and_kombu_still_keeps_them(kind: type[KombuTimer], most: int) -> None:
    timer = kind()
    for number in range(TASKS):
        entry = timer.call_after(HOUR, print)
        if number >= 10:
            entry.cancel()
    assert len(timer) <= most
    assert (len(timer) == TASKS) is (kind is KombuTimer)


def test_what_is_not_cancelled_comes_when_it_is_due() -> None:
    timer, now = Timer(), monotonic()
    schedule = iter(timer)
    for number in range(3 * MIN_ENTRIES):
        # The later ones are due first, and every third one stays.
        entry = timer.call_at(now - number, print, (number,))
        if number % 3:
            entry.cancel()

    due = [next(schedule)[1] for _ in range(MIN_ENTRIES)]

    assert [entry.args[0] for entry in due if entry] == list(range(3 * MIN_ENTRIES - 3, -1, -3))
    assert next(schedule) == (None, None)


def test_nodes_with_an_event_loop_use_it() -> None:
    app = Celery(broker="redis://127.0.0.1:1", set_as_current=False)
    app.steps["worker"].add(TimerStep)
    before = get_event_loop()

    def leave_logging_alone(**_: object) -> None:
        """Celery sets up no logging where somebody else does: other tests run in this process."""

    signals.setup_logging.connect(leave_logging_alone)
    try:
        # A worker with children forbids it in its process to wait for results, and so to the tests after this one.
        with allow_join_result():
            worker = app.Worker(pool="prefork")
        assert type(worker.timer) is Timer
        assert worker.timer is worker.hub.timer is worker.consumer.timer
    finally:
        signals.setup_logging.disconnect(leave_logging_alone)
        set_event_loop(before)
