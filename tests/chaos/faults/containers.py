"""Faults of the shipped containers: what Docker can do to them."""

from time import monotonic

from tests.chaos.event_log import CUT_OFF, DIED, Incident
from tests.chaos.faults.fault import LONGER, fault
from tests.chaos.testbeds.base import NODES
from tests.chaos.testbeds.containers import ContainerTestbed, node_name

# 128 and the signal's number.
KILLED = 137
# A container that was struck is noticed and connected again within a few seconds.
RECONNECT_SECONDS = 10.0

# Each strike takes half a minute.
container_fault = fault(1, 3, stalk_only=True)


@container_fault
def container_redis_kill(testbed: ContainerTestbed) -> None:
    """Redis's container killed and started again."""
    testbed.stack.docker("start", testbed.stack.kill_redis())
    testbed.stack.wait_healthy("redis")


@container_fault
def container_worker_kill(testbed: ContainerTestbed) -> None:
    """docker kill of a worker's container, and its start."""
    worker, since = testbed.choose_busy_worker(), monotonic()
    # Not earlier: a task that came and ended in between would be missing as if it had been acknowledged.
    snapshot = testbed.take_snapshot()
    testbed.stack.docker("kill", worker)
    testbed.incidents.append(Incident(DIED, since, monotonic(), node_name(worker), snapshot=snapshot))
    assert testbed.stack.inspect(worker)["State"]["ExitCode"] == KILLED
    testbed.stack.docker("start", worker)
    testbed.stack.wait_healthy("worker")


@container_fault
def container_worker_disconnect(testbed: ContainerTestbed) -> None:
    """A worker's container off the network for longer than its lease."""
    worker, network = testbed.choose_busy_worker(), testbed.network()
    since, snapshot = monotonic(), testbed.take_snapshot()
    testbed.stack.docker("network", "disconnect", network, worker)
    assert network not in testbed.stack.inspect(worker)["NetworkSettings"]["Networks"]
    testbed.let_time_pass(testbed.plan.lease * LONGER)
    testbed.stack.docker("network", "connect", network, worker)
    until = monotonic() + RECONNECT_SECONDS
    testbed.incidents.append(Incident(CUT_OFF, since, until, node_name(worker), snapshot=snapshot))


@container_fault
def container_redis_disconnect(testbed: ContainerTestbed) -> None:
    """Redis's container off the network for longer than a lease."""
    (redis,), network = testbed.stack.ids("redis"), testbed.network()
    testbed.stack.docker("network", "disconnect", network, redis)
    assert not testbed.stack.inspect(redis)["NetworkSettings"]["Networks"]
    testbed.let_time_pass(testbed.plan.lease * LONGER)
    testbed.stack.docker("network", "connect", "--alias", "redis", network, redis)


@container_fault
def container_worker_stop(testbed: ContainerTestbed) -> None:
    """docker stop of a worker's container under load, and its start."""
    worker = testbed.choose_busy_worker()
    testbed.stack.docker("stop", worker)
    assert testbed.stack.inspect(worker)["State"]["ExitCode"] == 0
    testbed.stack.docker("start", worker)
    testbed.stack.wait_healthy("worker")


@container_fault
def container_scale_down(testbed: ContainerTestbed) -> None:
    """make scale to one worker under load, and back to two."""
    testbed.stack.make("scale", WORKERS="1")
    assert len(testbed.stack.ids("worker")) == 1
    testbed.wait_progress()
    testbed.stack.make("scale", WORKERS=str(NODES))
