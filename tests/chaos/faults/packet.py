"""Publish a task and send a command in one packet, so that no worker gets in between."""

import json
import os
from contextlib import suppress
from typing import Any

from celery import Celery
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chaos.subjects import STOCK
from tests.chaos.testbeds.base import NODES
from tests.chaos.testbeds.processes import QUEUE, ProcessTestbed
from tests.chaos.workload.tasks import record
from tests.support.harness import READY_SECONDS
from tests.support.waiting import GaveUp

# The remark on a strike in which no stock node was waiting for the message.
NOBODY_WAITED = "no stock node was waiting for a message"


def publish_with(testbed: ProcessTestbed, *command: str) -> Any:
    """Publish a task and send a command in one packet, while the workers wait; the answer to the command."""
    wait_idle(testbed)
    name = f"chaos-packet-{testbed.events.count('sent'):06d}"
    # Sent once: a message that comes twice would be a task that runs twice.
    client = Redis(port=testbed.redis.port, password=testbed.redis.password, retry=Retry(NoBackoff(), 0))
    with client, client.pipeline(transaction=False) as packet:
        packet.lpush(QUEUE, build_message(testbed, name))
        packet.llen(QUEUE)
        packet.execute_command(*command)  # type: ignore[no-untyped-call]
        _, waiting, answer = packet.execute()
    if testbed.plan.subject == STOCK and waiting:
        testbed.remarks.append(NOBODY_WAITED)
    os.environ["CHAOS_EVENTS"] = str(testbed.events.directory)
    record("sent", name)
    return answer


def build_message(testbed: ProcessTestbed, name: str) -> str:
    """A task's message, sent to another queue by plain Celery, and readdressed."""
    with Celery("plain", broker=testbed.redis.url(), set_as_current=False) as app:
        app.send_task("chaos.work", (0.01,), task_id=name, queue="spare")
    fields = json.loads(str(testbed.redis.client().rpop("spare")))
    fields["properties"]["delivery_info"]["routing_key"] = QUEUE
    return json.dumps(fields)


def wait_idle(testbed: ProcessTestbed) -> None:
    """Wait until no node runs a task, and until stock nodes wait in a blocking command, as CLIENT LIST shows."""
    events = testbed.events
    with suppress(GaveUp):
        testbed.wait(lambda: events.tasks("sent") <= events.tasks("end"), testbed.plan.lease, "what was sent has ended")
    if testbed.plan.subject == STOCK:
        with suppress(GaveUp):
            testbed.wait(lambda: count_blocked(testbed) >= NODES, READY_SECONDS / 4, "every node waits")


def count_blocked(testbed: ProcessTestbed) -> int:
    """Connections that wait in a blocking command."""
    return sum(1 for client in testbed.redis.client().client_list() if "b" in client["flags"])
