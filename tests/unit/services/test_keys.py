"""services.broker.keys: what it says of Redis keys is what kombu does."""

import pytest
from kombu.transport.redis import Channel

from services.broker import keys
from services.broker.keys import carries_tasks, get_lists, parse_bound_queue, parse_list


class Keys(Channel):  # type: ignore[misc]
    """kombu's own spelling of keys, without a connection."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


@pytest.mark.parametrize("queue", ["celery", "with.dots-and_dashes", "odd\x06\x16name"])
def test_the_lists_of_a_queue_are_those_that_kombu_fills(queue: str) -> None:
    kombu = Keys()
    assert set(get_lists(queue)) == {kombu._q_for_pri(queue, priority) for priority in range(10)}
    assert [parse_list(key) for key in get_lists(queue)] == [(queue, step) for step in keys.PRIORITY_STEPS]
    assert parse_list(Keys.sep.join([queue, "1"])) == (queue, 1)


def test_the_most_urgent_list_comes_first() -> None:
    # 0 is the highest priority on Redis, and the one of a task that names none.
    assert get_lists("celery") == ("celery", "celery\x06\x163", "celery\x06\x166", "celery\x06\x169")


@pytest.mark.parametrize(
    ("exchange", "carries"),
    [
        *((queue, True) for queue in ("celery", "reports", "permanent.reports", "celeryevents", "pidbox")),
        *((exchange, False) for exchange in ("celeryev", "celery.pidbox", "reply.celery.pidbox")),
    ],
)
def test_bindings_of_tasks_are_told_from_those_of_events_and_commands(exchange: str, carries: bool) -> None:
    assert carries_tasks(Keys.keyprefix_queue % exchange) is carries


@pytest.mark.parametrize(
    ("routing_key", "pattern", "queue"),
    [("celery", "", "celery"), ("", "", "fanout"), ("a.#", "^a\\..*?$", "topic"), ("key", "", "reports")],
)
def test_the_queue_of_a_binding_is_found(routing_key: str, pattern: str, queue: str) -> None:
    # As kombu's Channel._queue_bind joins them.
    assert parse_bound_queue(Keys.sep.join([routing_key, pattern, queue])) == queue


def test_the_bookkeeping_of_workers_is_where_kombu_keeps_it() -> None:
    assert Channel.unacked_key == keys.UNACKED
