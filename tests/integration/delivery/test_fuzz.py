"""Malformed and extreme messages and queue names: delivered as they are, or parked with exactly their bytes."""

import json
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kombu import Consumer, Producer, Queue

from services.broker import keys
from services.broker.messages import extract_message
from services.delayed import scheduled
from services.delayed.rate_limits import Rate
from services.delivery import sweeper
from services.delivery.lease_manager import LeaseManager
from services.delivery.leases import Leases
from services.delivery.unacked import Rules, UnackedDeliveries, clock
from tests.integration.delivery.commands import (
    ENDS,
    add_counts,
    build_task,
    claim,
    drop_counts,
    end_leases,
    list_letters,
    read_counts,
    replay_letters,
)
from tests.support.harness import READY_LINE, Harness
from tests.support.redis.broker import Broker, Inbox
from tests.support.waiting import TIMEOUT_SECONDS, wait_until
from tests.support.workers import POOLS

pytestmark = pytest.mark.each_redis

RULES = Rules(lease=3600, max_deliveries=1000, visibility_timeout=3600, priority_steps=keys.PRIORITY_STEPS)
# Larger than any buffer between here and Redis, and than what one claim takes beside others.
LARGE = 10_000_000
# Deeper than Lua's reader follows (1000), and than Python's.
DEEP, DEEPER = 2000, 200_000

BODY = b64encode(b"the body").decode()


def kombus(**changes: Any) -> bytes:
    """A message as kombu writes it, except for `changes`."""
    properties = {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}, "priority": 0}
    plain = {"body": BODY, "content-encoding": "binary", "content-type": "application/data", "headers": {}}
    return json.dumps({**plain, "properties": {**properties, "body_encoding": "base64"}, **changes}).encode()


def splice(text: bytes) -> bytes:
    """A message of kombu's with raw text in its headers."""
    return kombus(headers={"x": "HERE"}).replace(b'"HERE"', text)


# Messages that can be delivered.
GOOD = {
    "plain": kombus(),
    "large": kombus(body=b64encode(b"x" * LARGE).decode()),
    "exotic floats": splice(b"[1e400, -1e400, -0.0, 1E+2, 5e-324, 0.1000000000000000055511151231257827]"),
    "not quite JSON": splice(b"[NaN, Infinity, -Infinity]"),
    "large numbers": splice(b"[%d, -%d, 18446744073709551616]" % (10**300, 10**300)),
    "the same key twice": splice(b'1, "x": 2, "x": {}'),
    "empty tables": splice(b'[[], {}, [[]], {"": {}}]'),
    "half a pair": splice(b'"\\ud800 \\udfff"'),
    "an escaped NUL": splice(b'"a\\u0000b"'),
    "any character": splice('"ü 日本 😀 \u2028 \x7f"'.encode()),
    "our separator": splice(rb'",\"\",\"x\"]"'),
    "our separator as keys": splice(b'["a","","x"]'),
    "our count": splice(b'"{\\"delivery_count\\":7,"'),
    "a count of its own": b'{"delivery_count":7,' + kombus()[1:],
    "a fractional count": b'{"delivery_count":1.5,' + kombus()[1:],
    "a count that is text": b'{"delivery_count":"7",' + kombus()[1:],
    "a large count": b'{"delivery_count":%d,' % 10**15 + kombus()[1:],
    "two counts": b'{"delivery_count":2,"requeue_count":3,' + kombus()[1:],
    "two counts and spaces": b' { "delivery_count": 2 , "requeue_count" : 1000 , ' + kombus()[1:],
    "a second count that is text": b'{"delivery_count":1,"requeue_count":"3",' + kombus()[1:],
    "a count at its end": kombus()[:-1] + b',"delivery_count":7}',
    "spaces": b' \n{ "delivery_count" : 2 , ' + kombus()[1:] + b"\t\n",
    "no headers": kombus(headers=None),
    "no priority": kombus(properties={"body_encoding": "base64"}),
    "a priority of another type": kombus(properties={"body_encoding": "base64", "priority": {"a": []}}),
    "a tag of another type": kombus(properties={"body_encoding": "base64", "delivery_tag": [1]}),
}
# Messages that cannot be decoded.
BAD = {
    "nothing": b"",
    "space": b" ",
    "an empty object": b"{}",
    "an empty list": b"[]",
    "a list": b'[1, {"a": 1.0e+400}]',
    "null": b"null",
    "a number": b"17",
    "text": b'"text"',
    "no JSON": b"hello, world",
    "the beginning of one": b'{"body": ',
    "an open brace": b"{",
    "not UTF-8": b"\xff\xfe\x00\x80",
    "not UTF-8 within": splice(b'"\xff\xfe"'),
    "a byte order mark": b"\xef\xbb\xbf" + kombus(),
    "NUL": b"\x00",
    "NUL within": splice(b'"a\x00b"'),
    "large and no JSON": b"x" * LARGE,
    "nested too deep": splice(b"[" * DEEPER + b"]" * DEEPER),
    "nested and no object": b"[" * DEEPER + b"]" * DEEPER,
    "a number that is too large": splice(b"1" * 5000),
    "our separator and no more": b',"","x"]',
    "our record": b'[{},"","x"]',
    "our count and no more": b'{"delivery_count":7,',
    "only our count": b'{"delivery_count":7}',
    "an invalid decimal": splice(b'{"__type__": "decimal", "__value__": "none"}'),
    "invalid bytes": splice(b'{"__type__": "bytes", "__value__": 1}'),
    "an invalid UUID": splice(b'{"__type__": "uuid", "__value__": {"int": "a"}}'),
    "an unknown type": splice(b'{"__type__": "none", "__value__": 1}'),
    "an object that becomes another": b'{"__type__": "bytes", "__value__": "a"}',
    "no properties": b'{"body": ""}',
    "headers and no more": b'{"headers": {}}',
    "properties in a list": kombus(properties=[]),
    "headers in a list": kombus(headers=[1]),
    "a body that is a number": kombus(body=17),
    "a body that is not base64": kombus(body="a"),
    "an unknown encoding": kombus(properties={"body_encoding": "rot13"}),
    "an encoding that is a number": kombus(properties={"body_encoding": 1}),
    "a delivery info in a list": kombus(properties={"body_encoding": "base64", "delivery_info": [1]}),
}
# How deep Python's own reader goes differs from version to version.
EITHER = {"nested deep": splice(b"[" * DEEP + b"]" * DEEP)}
ALL = GOOD | BAD | EITHER
QUEUES = (
    "celery", 'quo"te', "back\\slash", 'com,ma"', ',"","x"]', '"', "\\", '\\"', "]", "[{}]", "schön 日本 😀", "a b\tc",
    "new\nline", "\x00", "\x7f", "'", "%s%(.*)", "x" * 1000,
)  # fmt: skip


# --- The ways of a message through the scripts

COUNTED = ("crash", "its task has started and its lease ends")
WAYS = ("requeue", "postpone", "requeue later", "reject", *COUNTED, "its lease ends")


def settle(client: Any, tag: str, end: Callable[[UnackedDeliveries, str], None]) -> None:
    """End a delivery as the process does that has claimed it."""
    deliveries = UnackedDeliveries(RULES, Leases(redis.Redis(), RULES.lease))
    deliveries.add([tag], 1, clock())
    end(deliveries, tag)
    LeaseManager(deliveries, client, lambda _: None)._send(deliveries.take_pending())


def postpone(client: Any, tag: str, due: float, token: str = "") -> None:
    settle(client, tag, lambda deliveries, tag: deliveries.postpone(tag, due, "id", token))


def send_away(client: Any, tag: str, way: str) -> None:
    """End a delivery in one of the ways, or let its process die; then the time has come of whatever waits for it."""
    if way == "postpone":
        postpone(client, tag, 1)
    elif way in ENDS:
        settle(client, tag, ENDS[way])
    else:
        if way in COUNTED:
            client.sadd(keys.UNACKED_STARTED, tag)
        end_leases(client, tag)
    for field in client.zrange(keys.SCHEDULED, 0, -1):
        client.zadd(keys.SCHEDULED, {field: 1})
    sweeper.sweep(client, RULES)


def check(client: Any, queue: str, message: bytes, way: str) -> None:
    """Claim a message and send it on its way: it is where it should be, and nowhere else."""
    client.flushall()
    client.lpush(queue, message)
    send_away(client, claim(client, queue, RULES.lease).tag, way)
    lists = [raw for name in keys.get_lists(queue) for raw in client.lrange(name, 0, -1)]
    starts, requeues = read_counts(message)
    too_often = (way in COUNTED and starts >= RULES.max_deliveries) or (
        way == "requeue later" and requeues >= RULES.max_requeues
    )
    if way == "reject" or too_often:
        assert (lists, list_letters(client)) == ([], [(message, queue.encode())])
    else:
        unchanged = way in ("requeue", "postpone")
        after = message if unchanged else add_counts(message, way in COUNTED, way == "requeue later")
        assert (lists, list_letters(client)) == ([after], [])
    for key in (*keys.UNACKED_KEYS, *keys.SCHEDULED_KEYS):
        assert not client.exists(key), key


def wait_for_token(client: Any, due: float) -> None:
    """Let the only message there is wait for a token."""
    token = Rate.per_second("a [task]", 1, "node")._format_token(due, 1)
    postpone(client, claim(client, "celery", RULES.lease).tag, due, token)


@pytest.mark.parametrize("name", ALL)
def test_a_message_that_waited_for_its_rate_goes_to_stock_workers_and_is_replayed_with_its_own_bytes(
    broker: Broker, name: str
) -> None:
    broker.client.lpush("celery", ALL[name])
    for due in (2.0, 3.0):
        wait_for_token(broker.client, due)
        if name in GOOD:
            marked = json.loads(extract_message(broker.client.hget(keys.SCHEDULED_MESSAGES, "id")))
            assert marked["rate_limit_token"] == ["a [task]", "1.000000000", "node", due, 1]
        assert sweeper.sweep(broker.client, RULES).promoted == 1
    wait_for_token(broker.client, 4.0)

    scheduled.to_plain(broker.client)

    assert broker.client.lrange("celery", 0, -1) == [ALL[name]]
    if name in GOOD:
        wait_for_token(broker.client, 5.0)
        assert sweeper.sweep(broker.client, RULES).promoted == 1
        settle(broker.client, claim(broker.client, "celery", RULES.lease).tag, ENDS["reject"])
        assert b"rate_limit_token" in list_letters(broker.client)[0][0]
        assert replay_letters(broker.client, 1) == [1]
        assert broker.client.lrange("celery", 0, -1) == [drop_counts(ALL[name])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_no_message_is_damaged_on_its_way(broker: Broker, name: str, way: str) -> None:
    check(broker.client, "celery", ALL[name], way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_a_message_finds_back_to_a_queue_of_any_name(broker: Broker, queue: str, way: str) -> None:
    for message in (kombus(), b"", splice(rb'",\"\",\"x\"]"'), b',"","x"]'):
        check(broker.client, queue, message, way)


PIECES = st.sampled_from([
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\x00", b"\xff", b'"delivery_count"', b"7", b"1.5",
    b"1e400", b',"","x"]', b'{"delivery_count":7,', b'"requeue_count":2', b'"properties"', b'{"priority":', b"null",
    b'"__type__"',
])  # fmt: skip
MESSAGES = st.binary(max_size=60) | st.lists(PIECES, max_size=12).map(b"".join)
# Hypothesis tries words of the code as well, and no queue may have the name of a key that is no list.
OWN_KEYS = {*keys.UNACKED_KEYS, *keys.DEAD_LETTER_KEYS, keys.SWEEPS, *keys.SCHEDULED_KEYS}
CHARACTERS = st.characters(codec="utf-8", exclude_characters=keys.PRIORITY_SEPARATOR)
QUEUE_NAMES = st.text(CHARACTERS, min_size=1, max_size=20).filter(lambda name: name not in OWN_KEYS)


def test_no_message_whatever_is_damaged_on_its_way(broker: Broker) -> None:
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(message=MESSAGES, queue=QUEUE_NAMES | st.sampled_from(QUEUES), way=st.sampled_from(WAYS))
    @example(message=b'{"delivery_count":1.5,"a":1}', queue="celery", way="crash")
    def run(message: bytes, queue: str, way: str) -> None:
        check(broker.client, queue, message, way)

    run()


# --- Through a consumer


def test_a_consumer_gets_what_can_be_read_and_survives_the_rest(broker: Broker) -> None:
    for message in ALL.values():
        broker.client.lpush("celery", message)
    inbox = Inbox(broker.connect().channel(), "celery", prefetch=3)

    def all_came() -> bool:
        with suppress(TimeoutError):
            inbox.channel.connection.client.drain_events(timeout=0.05)
        return len(inbox.messages) + int(broker.client.zcard(keys.DEAD_LETTERS)) == len(ALL)

    wait_until(all_came, 6 * TIMEOUT_SECONDS, "all is delivered or parked", broker.describe, look=0)
    broker.nothing_is_left()
    assert not broker.client.exists(*keys.get_lists("celery"))
    deep, parked = EITHER["nested deep"], [message for message, _ in list_letters(broker.client)]
    good, bad = ([*GOOD.values()], [*BAD.values(), deep]) if deep in parked else ([*GOOD.values(), deep], BAD.values())
    assert sorted(parked) == sorted(bad)
    for message, sent in zip(inbox.messages, good, strict=True):
        assert_is_unchanged(message, sent)


def assert_is_unchanged(message: Any, sent: bytes) -> None:
    """What a consumer got is what was sent, apart from what a delivery adds."""
    fields = json.loads(sent)
    counts = [fields.pop(name, 0) for name in ("delivery_count", "requeue_count")]
    count, asked = (value if isinstance(value, int) else 0 for value in counts)
    assert message.body == (b"x" * LARGE if len(sent) > LARGE else b"the body")
    headers = dict(message.headers)
    if fields["headers"] is not None:
        assert (headers.pop("delivery_count"), headers.pop("requeue_count")) == (max(1, count) + asked, asked)
    assert repr(headers) == repr(fields["headers"] or {})
    if count:
        info = fields["properties"].get("delivery_info") or {}
        fields["properties"]["delivery_info"] = info | {"redelivered": True}
    ours = {"delivery_tag"}
    assert {k: v for k, v in message.properties.items() if k not in ours} == {
        k: v for k, v in fields["properties"].items() if k not in ours
    }


@pytest.mark.parametrize("name", BAD)
def test_basic_get_parks_what_cannot_be_read(broker: Broker, name: str) -> None:
    broker.client.lpush("celery", BAD[name])
    assert broker.connect().channel().basic_get("celery") is None
    broker.wait_until(lambda: list_letters(broker.client) == [(BAD[name], b"celery")], "it is parked")
    broker.nothing_is_left()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside one that acknowledges"])
def test_a_queue_without_acknowledgements_survives_what_cannot_be_read(broker: Broker, beside: bool) -> None:
    channel = broker.connect().channel()
    other = Inbox(channel, "acknowledged") if beside else None
    inbox = Inbox(channel, "celery", no_ack=True, ack=False)
    for message in BAD.values():
        broker.client.lpush("celery", message)
    broker.send("celery", *"abc")
    assert inbox.drain(3, broker) == [*"abc"]
    if other:
        broker.send("acknowledged", "d")
        assert other.drain(1, broker) == ["d"]
    broker.nothing_is_left()
    assert not broker.client.exists("celery")


@pytest.mark.parametrize("queue", QUEUES, ids=repr)
def test_a_consumer_gets_the_messages_of_a_queue_of_any_name(broker: Broker, queue: str) -> None:
    Producer(broker.connect().channel()).publish("sent", routing_key=queue, priority=6)
    channel = broker.connect().channel()
    first = Inbox(channel, queue, ack=False)
    assert first.drain(1, broker) == ["sent"]
    channel.close()
    broker.nothing_is_left()
    second = Inbox(broker.connect().channel(), queue)
    assert second.drain(1, broker) == ["sent"]
    broker.nothing_is_left()


def test_a_consumer_that_raises_keeps_what_it_has_and_gets_the_rest(broker: Broker) -> None:
    channel = broker.connect().channel()
    got = []

    def fail(message: Any) -> None:
        got.append(message)
        raise ZeroDivisionError

    broker.send("celery", *range(3))
    with Consumer(channel, [Queue("celery", no_declare=True)], on_message=fail):
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                channel.connection.client.drain_events(timeout=TIMEOUT_SECONDS)
        assert broker.count_unacked() == 3
        for message in got:
            message.ack()
    broker.nothing_is_left()


# --- What stock consumers leave


def stock_record(message: bytes, exchange: str = "", key: str = "celery") -> bytes:
    """A record as kombu writes it."""
    return json.dumps([json.loads(message), exchange, key]).encode()


def restore(client: Any, *records: bytes, queue: str = "celery") -> list[Any]:
    """Sweep, when the stock consumers of these records are dead; return what is on the list then."""
    for number, record in enumerate(records):
        client.hset(keys.UNACKED, f"stock{number}", record)
        client.zadd(keys.UNACKED_INDEX, {f"stock{number}": number})
    client.hset(keys.SWEEPS, mapping={"last": client.time()[0], "rest": 0})
    found = sweeper.sweep(client, RULES)
    sweeper.requeue_overdue(client, found.stock, keys.PRIORITY_STEPS)
    return [json.loads(raw) for raw in client.lrange(queue, 0, -1)]


def test_all_messages_of_dead_stock_consumers_are_requeued_whatever_is_in_them(broker: Broker) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"headers": None},
        {"headers": []},
        {"properties": {"delivery_tag": "t"}},
        {"properties": {"delivery_info": None}},
        {"properties": {"delivery_info": {}, "priority": "none"}},
    ]
    no_messages = [b"none", b"[]", b"[1, 2, 3]", b"\xff", b"[" * DEEPER]
    records = [stock_record(kombus(body=f"{number}", **change)) for number, change in enumerate(changes)]

    restored = restore(broker.client, *no_messages, *records)

    assert sorted(one["body"] for one in restored) == [f"{number}" for number in range(len(changes))]
    # The others are left to the program that wrote them.
    assert broker.client.hlen(keys.UNACKED) == len(no_messages)


ROUTES = {
    "direct": (("celery", "", "bound"), "celery", "bound"),
    "topic": (("a.*", r"^a\.[^.]*?$", "bound"), "a.b", "bound"),
    "topic with several words": (("a.#", r"^a\..*?$", "bound"), "a.b.c", "bound"),
    "without a binding": (("other", "", "bound"), "celery", "celery"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_stock_message_goes_where_its_exchange_says(broker: Broker, route: str) -> None:
    member, key, queue = ROUTES[route]
    broker.client.sadd(f"{keys.BINDINGS}ours", keys.PRIORITY_SEPARATOR.join(member))
    assert len(restore(broker.client, stock_record(kombus(), "ours", key), queue=queue)) == 1


# --- Through a worker

ADD = "services.tasks.arithmetic.add"
# Values that no header of a task should have.
ODD_HEADERS: dict[str, list[Any]] = {
    "eta": ["garbage", 5, [], {"a": 1}, "9999-12-31T23:59:59.999999+00:00", "0001-01-01T00:00:00"],
    "expires": ["garbage", -5, [], {"a": 1}, 1e300],
    "timelimit": [5, "ab", [1], [None] * 3, {"a": 1}, ["a", "b"], [-1, -1]],
    "retries": ["a", [], -1, 10**30],
    "group": [5, [], {}],
    "parent_id": [5, []],
    "root_id": [{}, 5],
    "origin": [5, []],
    "shadow": [5, [], {}],
    "argsrepr": [5, [], {}],
    "kwargsrepr": [5, []],
    "lang": [5, "c++"],
    "ignore_result": ["a", []],
    "stamps": [5, {"a": 5}],
    "stamped_headers": [5, ["a"], {"a": 1}],
    "replaced_task_nesting": ["a", []],
    "id": ["", 5, None, [], "\ud800", "x" * 100_000, "a b", "../a"],
    "task": ["", 5, None, [], "\ud800", "services.tasks.arithmetic", "no.such.task"],
    "compression": ["gzip", "none", 5],
    "delivery_count": ["a", -1],
    "requeue_count": ["a", -1],
}
ODD_BODIES: list[Any] = [
    None, 5, "a", [], {}, [[], {}], [5, {}, {}], [[], 5, {}], [[], {}, 5], [[4, 3], {}, {"callbacks": 5}],
    [[4, 3], {}, {"errbacks": [5]}], [[4, 3], {}, {"chain": "a"}], [[4, 3], {}, {"chain": [5]}],
    [[4, 3], {}, {"chord": 5}], [[4, 3], {"\ud800": 1}, {}], [["\ud800", {}], {}, {}],
]  # fmt: skip
ODD_PROPERTIES: dict[str, list[Any]] = {
    "correlation_id": [5, [], {}],
    "reply_to": [5, [], {}],
    "priority": ["a", -5, 100, None],
    "delivery_info": [None, {}, {"exchange": 5, "routing_key": []}],
}


def old_task(name: str, count: int) -> bytes:
    """A message in the first version of Celery's protocol, without headers."""
    fields = json.loads(build_task({"task": name, "id": uuid4().hex, "args": [4, 3], "kwargs": {}}, count=count))
    return json.dumps(fields | {"headers": {}}).encode()


# Messages that can be read, and are no tasks.
NO_HEADERS: tuple[Any, ...] = ({}, [], {"task": 7, "id": "x"})
NO_TASKS = [json.dumps(json.loads(build_task()) | {"headers": headers}).encode() for headers in NO_HEADERS]
NO_TASKS += [b'{"properties": {}}', kombus()]


def odd_tasks() -> list[bytes]:
    """Messages that no worker can run, or only in part."""
    return [
        *BAD.values(),
        *NO_TASKS,
        *(build_task(**{name: value}) for name, values in ODD_HEADERS.items() for value in values),
        *(build_task(body) for body in ODD_BODIES),
        *(build_task(properties={name: value}) for name, values in ODD_PROPERTIES.items() for value in values),
        *(old_task(name, count) for name in (ADD, "no.such.task") for count in (0, 2)),
        build_task(count=2),
        build_task(task="no.such.task", count=2),
    ]


@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_survives_every_message_and_leaves_none_unacknowledged(harness: Harness, pool: str) -> None:
    stack = harness.stack(harness.redis(""), WORKER_CONCURRENCY="1", WORKER_POOL=pool)
    client: Any = redis.Redis(port=stack.redis.port)
    for message in odd_tasks():
        client.lpush("celery", message)
    worker = stack.worker()
    assert stack.send(ADD, 4, 3).get(timeout=3 * TIMEOUT_SECONDS) == 7

    def all_done() -> bool:
        assert worker.process.count(READY_LINE) <= 1, worker.process.matches(r"(.* (?:WARN|CRIT|CRITICAL) .*)")
        return not client.exists("celery", keys.UNACKED)

    harness.wait_until(all_done, 3 * TIMEOUT_SECONDS, "nothing is left")
    assert worker.process.count("nrecoverable") == 0
    numbers = [int(number) for number in client.zrange(keys.DEAD_LETTERS, 0, -1)]
    parked = [client.hmget(f"{keys.DEAD_LETTER}{number}", "message", "queue", "reason") for number in numbers]
    undecodable = [message for message, *rest in parked if rest == [b"celery", b"undecodable"]]
    assert [message for message in (*BAD.values(), *NO_TASKS) if message not in undecodable] == []
    harness.wait_until(lambda: not client.exists(keys.DEAD_LETTERS_UNTOLD), TIMEOUT_SECONDS, "nobody is left to tell")
