"""What a loop says while it waits for Redis: one line when it begins, one a minute, one when it is over."""

import pytest
from redis import Redis
from redis.exceptions import ConnectionError, ResponseError
from redis.sentinel import Sentinel

from services.broker.client import describe_server
from services.broker.outages import MINUTE, Outage

REFUSED = ConnectionError("Connection refused")


class Loop:
    """A loop that waits, its clock, and its log."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.log: list[str] = []
        self.outage = Outage("lease", self.log.append, lambda: self.now)

    def fail(self, seconds: float = 0.0, error: Exception = REFUSED) -> None:
        """Fail each second for so many seconds, and now."""
        for _ in range(int(seconds)):
            self.outage.record_failure(error, "Redis at here/0", "hear of 3 deliveries")
            self.now += 1
        self.outage.record_failure(error, "Redis at here/0", "hear of 3 deliveries")


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_an_outage_has_a_line_when_it_begins_one_a_minute_and_one_when_it_is_over(loop: Loop) -> None:
    # Nothing had to be waited for.
    assert not loop.outage.record_recovery()
    loop.fail(2 * MINUTE + 5)
    loop.outage.record_recovery()
    assert loop.log == [
        "lease: waiting for Redis at here/0 to hear of 3 deliveries: Connection refused",
        "lease: still waiting, after 60 s, for Redis at here/0 to hear of 3 deliveries: Connection refused",
        "lease: still waiting, after 120 s, for Redis at here/0 to hear of 3 deliveries: Connection refused",
        "lease: goes on after 125.0 s of waiting for Redis at here/0",
    ]


def test_a_redis_that_comes_and_goes_has_two_lines_a_minute(loop: Loop) -> None:
    for _ in range(int(3 * MINUTE / 5)):
        loop.fail(3)
        loop.now += 2
        assert loop.outage.record_recovery()
    assert [line.split(" ")[1] for line in loop.log] == ["waiting", "goes"] * 3


def test_an_outage_that_follows_another_at_once_is_said_when_a_minute_is_over(loop: Loop) -> None:
    loop.fail()
    loop.outage.record_recovery()
    loop.now += 10
    loop.fail(MINUTE - 10)
    loop.outage.record_recovery()
    assert [line.split(" ")[1] for line in loop.log] == ["waiting", "goes", "waiting", "goes"]
    assert "goes on after 50.0 s" in loop.log[-1]


def test_a_line_tells_what_redis_said_without_the_command_that_was_refused(loop: Loop) -> None:
    loop.fail(error=ResponseError("Command # 1 (SETEX a b) of pipeline caused error: OOM command not allowed"))
    assert loop.log == ["lease: waiting for Redis at here/0 to hear of 3 deliveries: OOM command not allowed"]


def test_the_place_of_a_redis_has_no_login() -> None:
    clients = [
        Redis(host="here", port=7000, db=2, password="secret"),
        Redis(unix_socket_path="/run/redis.sock", password="secret"),
        Sentinel([("there", 26379)], password="secret").master_for("main"),  # type: ignore[no-untyped-call]
    ]
    places = ("here:7000/2", "/run/redis.sock/0", "main/0")
    assert list(map(describe_server, clients)) == [f"Redis at {place}" for place in places]
