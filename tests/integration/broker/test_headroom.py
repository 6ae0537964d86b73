"""What a worker writes while Redis is at maxmemory: it goes through as long as the headroom lasts."""

from typing import Any

import pytest
import redis
from kombu import Exchange, Producer, Queue
from redis.exceptions import ResponseError

from services.broker import headroom, scripts
from services.broker.retry import RetryState
from tests.support.redis.broker import QUIET, Broker, Inbox, Listener
from tests.support.waiting import TIMEOUT_SECONDS, holds_for, wait_until

pytestmark = pytest.mark.each_redis

# Beside it nothing counts that a test does.
FILLER_BYTES = 20_000_000
# Of maxmemory: a producer is refused, a claim is refused, everybody is refused.
FULL, CLAIMED, USED_UP = 1.06, 1.19, 1.3
# As far as Redis 6.2 and redis-py say it alike.
REFUSED = "command not allowed when used memory"
# Names and arguments of what workers send to a Redis that keeps results, and what takes no memory.
COMMANDS: tuple[tuple[Any, ...], ...] = (
    ("SET", "text", "ü"),
    ("SETEX", "result", 60, b"\x00\xff"),
    ("SADD", "set", "a", "b"),
    ("ZADD", "order", 1.5, "a"),
    ("HSET", "hash", "field", "value"),
    ("RPUSH", "list", *map(str, range(300))),
    ("EXPIRE", "list", 60),
    ("HGET", "hash", "field"),
    ("LRANGE", "list", 0, -1),
    ("ZRANGE", "order", 0, -1),
    ("GET", "nothing"),
    ("LLEN", "list"),
    ("PUBLISH", "channel", "news"),
    ("INCR", "number"),
)


@pytest.fixture
def broker(broker: Broker) -> Broker:
    """A Redis that holds much beside what a test writes."""
    broker.client.setrange("filler", FILLER_BYTES, "x")
    return broker


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryState, "in_worker", True)


def worker(broker: Broker, **options: Any) -> Any:
    """A client that uses the headroom, when the process is a worker."""
    return headroom.Client(port=broker.server.port, socket_timeout=10, **options)


def refuses(call: Any, *arguments: Any) -> None:
    with pytest.raises(ResponseError, match=REFUSED):
        call(*arguments)


def refuses_all(broker: Broker) -> None:
    """A command, a transaction and a script are refused, and nothing of them has happened."""
    client = worker(broker)
    refuses(client.set, "text", "more")
    refuses(client.pipeline().set("text", "more").execute)
    refuses(client.register_script("return redis.call('INCR', KEYS[1])"), ["number"])
    assert broker.client.keys() == [b"filler"]


def test_commands_and_scripts_of_a_worker_have_their_usual_answers(broker: Broker, in_worker: None) -> None:
    usual = [broker.client.execute_command(*command) for command in COMMANDS]
    broker.client.delete(*(command[1] for command in COMMANDS))
    broker.server.fill(FULL)

    client = worker(broker)
    assert [client.execute_command(*command) for command in COMMANDS] == usual
    client.delete(*(command[1] for command in COMMANDS))
    with client.pipeline() as pipe:
        for command in COMMANDS:
            pipe.execute_command(*command)
        assert pipe.execute() == usual
    script = client.register_script("return {KEYS[1], redis.call('INCRBY', KEYS[1], ARGV[1])}")
    assert [script(["count"], [3]), script(["count"], [4])] == [[b"count", 3], [b"count", 7]]


def test_producers_have_no_headroom(broker: Broker) -> None:
    broker.server.fill(FULL)

    refuses_all(broker)
    refuses(broker.send, "one", "more")
    assert broker.client.keys() == [b"filler"]


def test_headroom_that_is_used_up_refuses_everybody_but_what_takes_no_memory(broker: Broker, in_worker: None) -> None:
    broker.server.fill(USED_UP)

    refuses_all(broker)
    pipe = worker(broker).pipeline()
    assert pipe.llen("list").expire("text", 60).delete("text").execute() == [0, False, 0]


def test_what_may_have_been_carried_out_is_not_repeated_and_an_error_stays_one(broker: Broker, in_worker: None) -> None:
    broker.client.mset({"text": "no number", "number": 0})
    broker.server.fill(FULL)

    # Of a pipeline that is no transaction a part may have been.
    refuses(worker(broker).pipeline(transaction=False).expire("number", 60).incr("number").execute)
    assert broker.client.get("number") == b"0"
    # The refusal stays what it was: only with room does Redis look further.
    refuses(worker(broker).pipeline().incr("text").execute)
    broker.server.make_room()
    with pytest.raises(ResponseError, match="not an integer"):
        worker(broker).pipeline().incr("text").execute()


@pytest.mark.parametrize("right", ["-eval", "-info", "-del"])
def test_a_user_without_the_rights_for_it_has_no_headroom(broker: Broker, in_worker: None, right: str) -> None:
    broker.client.execute_command("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", "+@all", "-evalsha", right)
    broker.server.fill(FULL)

    client = worker(broker, username="plain", password="word")
    refuses(client.set, "text", "more")
    refuses(client.pipeline().set("text", "more").execute)


def test_messages_are_claimed_from_a_full_redis_and_leave_half_of_its_headroom(broker: Broker) -> None:
    broker.send("one", *range(100))
    broker.server.fill(CLAIMED)
    listener = Listener(broker.connect(), "one")
    with listener.running():
        holds_for(lambda: not listener.bodies, QUIET, "nothing is claimed", broker.describe)
        broker.server.fill(FULL)
        wait_until(lambda: len(listener.bodies) == 100, TIMEOUT_SECONDS, "all arrive", broker.describe)
        broker.nothing_is_left()
    assert listener.bodies == list(range(100))
    refuses(broker.client.set, "text", "more")


def test_a_claim_of_who_may_not_ask_how_full_redis_is_waits_for_room(broker: Broker) -> None:
    broker.client.execute_command("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", "+@all", "-info")
    broker.send("one", "a")
    broker.server.fill(FULL)
    inbox = Inbox(broker.connect(broker.server.url(0, "word", "plain")).channel(), "one")
    inbox.stays_at(0)
    broker.server.make_room()
    assert inbox.drain(1, broker) == ["a"]


@pytest.mark.parametrize("full", [FULL, USED_UP])
def test_a_binding_that_was_refused_is_made_by_the_next_publish(broker: Broker, full: float) -> None:
    producer = Producer(broker.connect().channel())
    queue = Queue("late", Exchange("late"), routing_key="late")
    publish = {"exchange": queue.exchange, "routing_key": "late", "declare": [queue]}
    broker.server.fill(full)
    refuses(lambda: producer.publish("refused", **publish))
    broker.server.make_room()

    producer.publish("taken", **publish)

    assert broker.waiting("late") == ["taken"]


def test_every_script_of_a_worker_can_be_run_with_headroom(broker: Broker) -> None:
    """Redis reads them all; what each does is in test_model.py."""
    for script in scripts.ALL:
        broker.client.script_load(script.with_headroom.text)
    assert redis.Redis(port=broker.server.port).script_exists(scripts.PUBLISH.with_headroom.sha) == [True]
