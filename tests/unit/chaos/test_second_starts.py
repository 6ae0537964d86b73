"""Second starts of tasks are found and explained; the counts of all chaos tests rest on that."""

from pathlib import Path

import pytest

from tests.chaos.event_log import (
    ACK_BUFFER,
    ACKED_AFTER,
    CUT_OFF,
    DIED,
    FORGOT,
    FROZEN,
    NO_CAUSE,
    SLOTS,
    STALLED,
    STOCK,
    Event,
    EventLog,
    Incident,
    Snapshot,
)
from tests.chaos.second_starts import find_excessive, find_second_starts, find_unrecorded, measure_worst_delay

# The first start of a task is at 10, on a node that some incident meets; the second one is at 20, on another.
FIRST, SECOND = 10.0, 20.0


def event(
    word: str, at: float, node: str = "node1@stalk", pid: int = 1, *, number: float = 1, task: str = "t"
) -> Event:
    return Event(word, task, pid, node, at, number)


def why(*incidents: Incident, ended: float | None = None, first: str = "node1@stalk", mixed: bool = True) -> list[str]:
    """Why the task started twice."""
    events = [event("start", SECOND, "node2@stalk", 2), event("start", FIRST, first)]
    events += [event("end", ended, first)] if ended else []
    return [again.why for again in find_second_starts(events, list(incidents), mixed)]


def test_every_start_but_the_first_is_counted() -> None:
    events = [event("start", FIRST), event("end", FIRST)]
    assert find_second_starts(events, []) == []
    events += [event("start", at, pid=pid) for pid, at in ((2, SECOND), (3, SECOND + 1))]
    assert len(find_second_starts(events, [])) == 2


@pytest.mark.parametrize(
    ("incident", "is_cause"),
    [
        (None, False),
        (Incident(DIED, 15, 15, "node1@stalk"), True),
        (Incident(DIED, 15, 15, pid=1), True),
        (Incident(FORGOT, 15, 16), True),
        # The task started while its holder was cut off.
        (Incident(CUT_OFF, 5, 15), True),
        # Of another node or process, or at another time.
        (Incident(DIED, 15, 15, "node2@stalk"), False),
        (Incident(DIED, 15, 15, pid=2), False),
        (Incident(DIED, 5, 5, "node1@stalk"), False),
        (Incident(DIED, 25, 25, "node1@stalk"), False),
    ],
)
def test_what_happened_to_its_holder_in_between_is_the_cause(incident: Incident | None, is_cause: bool) -> None:
    assert why(*[incident] if incident else []) == [incident.kind if incident and is_cause else NO_CAUSE]


@pytest.mark.parametrize(("later", "expected"), [(ACKED_AFTER, DIED), (ACKED_AFTER + 1, NO_CAUSE)])
def test_a_task_that_ended_before_many_others_of_its_node_has_no_cause_to_start_again(
    later: int, expected: str
) -> None:
    killed = Incident(DIED, 15, 15, "node1@stalk")
    events = [event("start", FIRST), event("end", 11), event("start", SECOND, "node2@stalk", 2)]
    events += [event("end", 12, task=f"later{number}") for number in range(later)]
    # What other nodes do, or what it does afterwards, tells nothing.
    events += [event("end", at, node, task="other") for at, node in ((12, "node2@stalk"), (16, "node1@stalk"))]

    assert [again.why for again in find_second_starts(events, [killed])] == [expected]


@pytest.mark.parametrize(
    ("held", "ended", "expected"),
    [
        # It had ended, and Redis still had it: the acknowledgement was not made yet.
        ({"t"}, 14.9, DIED),
        # Redis had been told that it was done.
        (set(), 14.9, NO_CAUSE),
        # It ended afterwards, or never.
        (set(), 15.1, DIED),
        (set(), None, DIED),
    ],
)
def test_a_task_that_redis_did_not_have_any_more_has_no_cause_to_start_again(
    held: set[str], ended: float | None, expected: str
) -> None:
    incident = Incident(DIED, 15, 16, "node1@stalk", snapshot=Snapshot(frozenset(held), frozenset()))
    assert why(incident, ended=ended) == [expected]


def test_a_process_that_killed_itself_is_a_dead_holder_of_all_that_it_started_before_its_end() -> None:
    events = [event("dies", FIRST, task="poison"), event("start", FIRST + 1), event("start", SECOND, pid=2)]
    assert [again.why for again in find_second_starts(events, [])] == [DIED]


@pytest.mark.parametrize(
    ("node", "until", "incidents", "expected"),
    [
        ("node1@stalk", 15, [], STALLED),
        ("node1@stalk", FIRST - 1, [], NO_CAUSE),
        ("node3@stalk", 15, [], NO_CAUSE),
        # What was done to a node comes before what the node recorded.
        ("node1@stalk", 15, [Incident(FROZEN, 11, 15, "node1@stalk")], FROZEN),
    ],
)
def test_a_node_that_was_stalled_for_most_of_a_lease_is_the_cause(
    node: str, until: float, incidents: list[Incident], expected: str
) -> None:
    events = [event("start", FIRST), event("start", SECOND, "node2@stalk", 2)]
    events += [event("stalled", until, node, number=4, task="-")]
    assert [again.why for again in find_second_starts(events, incidents)] == [expected]


@pytest.mark.parametrize(("between", "expected"), [(SLOTS - 1, FROZEN), (SLOTS, NO_CAUSE)])
def test_a_thawed_node_may_first_start_tasks_whose_lease_it_had_checked_before(between: int, expected: str) -> None:
    events = [event("start", FIRST, "node2@stalk", 2), event("end", 11, "node2@stalk", 2), event("start", SECOND)]
    events += [event("start", 18, task=f"first{number}") for number in range(between)]
    frozen = Incident(FROZEN, 9, 17, "node1@stalk")

    assert [again.why for again in find_second_starts(events, [frozen])] == [expected]


@pytest.mark.parametrize(
    ("first", "mixed", "expected"),
    [("node1@stock", True, STOCK), ("node1@stalk", True, NO_CAUSE), ("node1@stock", False, NO_CAUSE)],
)
def test_a_body_that_a_stock_worker_has_sent_comes_again_with_the_part_that_it_held(
    first: str, mixed: bool, expected: str
) -> None:
    events = [event("start", FIRST, first, task="c-01"), event("start", 11, task="c-body")]
    events += [event("start", 18, "node2@stalk", task="c-01"), event("start", SECOND, "node2@stalk", task="c-body")]

    again = find_second_starts(events, [], mixed)

    # Stock workers are a cause only where they take part; the body's is that of the part.
    assert [(each.start.task, each.why) for each in again] == [("c-01", expected), ("c-body", expected)]


def test_more_second_starts_than_one_incident_explains_are_noticed() -> None:
    incident = Incident(FROZEN, 15, 15, "node1@stalk")
    events = [event("start", at, task=f"t{n}", pid=1) for n in range(ACK_BUFFER + 3) for at in (FIRST, SECOND)]
    again = find_second_starts(events, [incident])

    assert find_excessive(again, running=3) == []
    assert len(find_excessive(again, running=2)) == 1


def test_the_worst_delay_is_beyond_the_length_of_a_task() -> None:
    events = [event("sent", 1, number=2), event("end", 8), event("end", 20), event("sent", 1, number=0, task="never")]
    assert measure_worst_delay(events) == 5


def test_events_are_read_on_from_where_the_last_whole_line_ended(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events")
    file = tmp_path / "events" / "host-1"
    file.write_text("sent a 1 - 1.0 0.01\nstart a 2 node1@x 1.5 1\nsent b 1 - 1.0")
    assert events.tasks("sent") == {"a"}
    with file.open("a") as more:
        more.write(" 0.01\nstart b 3 node2@x 1.6 1\nend a 2 node1@x 1.7 1\n")

    assert events.tasks("sent") == {"a", "b"}
    assert (events.count("start"), events.count("start", "node2@x")) == (2, 1)
    assert [each.task for each in events.running()] == ["b"]


@pytest.mark.parametrize(
    ("at", "count", "told", "node", "is_unrecorded"),
    [
        # The count has grown.
        (FIRST, 2, {"t"}, "node1@stalk", False),
        # It has not, although Redis had been told of the first start.
        (FIRST, 1, {"t"}, "node1@stalk", True),
        # Redis had not.
        (FIRST, 1, set(), "node1@stalk", False),
        # A stock worker's count is no header.
        (FIRST, 1, {"t"}, "node1@stock", False),
        # The start came after the snapshot, which has an earlier one, on a node that died before.
        (14.9, 1, {"t"}, "node1@stalk", True),
        (15.1, 1, {"t"}, "node1@stalk", False),
    ],
)
def test_a_second_start_has_to_say_that_it_is_one(
    at: float, count: float, told: set[str], node: str, is_unrecorded: bool
) -> None:
    events = [event("start", at, node), event("start", SECOND, "node2@stalk", 2, number=count)]

    snapshot = Snapshot(frozenset({"t"}), frozenset(told))
    again = find_second_starts(events, [Incident(DIED, 15, 16, node, snapshot=snapshot)])

    assert [(each.why, each.recorded) for each in again] == [(DIED, count == 2)]
    assert find_unrecorded(again) == again * is_unrecorded
