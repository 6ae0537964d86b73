"""Faults of connections to Redis: cut, half open, a reply dropped."""

from time import monotonic

from tests.chaos.event_log import CUT_OFF, Incident
from tests.chaos.faults.fault import Fault, fault
from tests.chaos.faults.packet import publish_with
from tests.chaos.subjects import REPLIES
from tests.chaos.testbeds.base import GO_ON_SECONDS
from tests.chaos.testbeds.processes import ProcessTestbed
from tests.support.redis.proxy import Proxy

# A client that hears nothing for so long closes its connection (config/celery.py, and workload/stock_app.py).
SOCKET_TIMEOUT = 10


@fault(3, 20, proxied=True)
def cut_connections(testbed: ProcessTestbed) -> None:
    """Every connection to Redis cut."""
    assert get_proxy(testbed).cut() > 0


@fault(1, 3, proxied=True)
def half_open_connections(testbed: ProcessTestbed) -> None:
    """Every connection half open: what is sent is swallowed, nobody is told."""
    now, snapshot = monotonic(), testbed.take_snapshot()
    assert get_proxy(testbed).half_open() > 0
    if testbed.plan.lease <= SOCKET_TIMEOUT:
        # A node that waits so long for a reply cannot renew its leases in time.
        until = monotonic() + SOCKET_TIMEOUT + testbed.plan.lease
        testbed.incidents.append(Incident(CUT_OFF, now, until, snapshot=snapshot))


def drop_reply(name: str, about: str) -> Fault:
    """The fault of dropping one reply to a command of this kind; see tests.chaos.subjects."""

    def strike(testbed: ProcessTestbed) -> None:
        trap = get_proxy(testbed).drop_reply(REPLIES[name])
        try:
            testbed.wait(trap.dropped.is_set, testbed.plan.lease + GO_ON_SECONDS, f"a reply to {name} is dropped")
        finally:
            get_proxy(testbed).disarm()

    strike.__name__, strike.__doc__ = f"drop_{name}_reply", about
    return fault(3, 20, proxied=True)(strike)


drop_claim_reply = drop_reply("claim", "The reply that brings a worker its task is dropped with its connection.")
drop_ack_reply = drop_reply("ack", "The reply to an acknowledgement is dropped with its connection.")
drop_publish_reply = drop_reply("publish", "The reply to a publish is dropped with its connection.")
drop_result_reply = drop_reply("result", "The reply to a result that is stored is dropped with its connection.")


def get_proxy(testbed: ProcessTestbed) -> Proxy:
    assert testbed.proxy, "this fault needs a proxy"
    return testbed.proxy


@fault(3, 20, load="")
def kill_clients_with_publish(testbed: ProcessTestbed) -> None:
    """CLIENT KILL of every worker's connections in the same packet as a publish."""
    assert publish_with(testbed, "CLIENT", "KILL", "SKIPME", "yes") > 0
