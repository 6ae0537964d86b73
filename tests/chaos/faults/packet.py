"""Publish a task and send a command in one packet, so that no worker gets in between."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from functools import partial

from celery import Celery

from tests.chaos.subjects import STOCK
from tests.chaos.testbeds.base import GO_ON_SECONDS, NODES
from tests.chaos.testbeds.processes import QUEUE, ProcessTestbed
from tests.chaos.workload.tasks import record
from tests.support.waiting import GaveUp
from tests.support.world import READY_SECONDS

# The remark on a strike in which no stock node was waiting for the message.
NOBODY_WAITED = "no stock node was waiting for a message"


def publish_with(testbed: ProcessTestbed, command: list[str]) -> list[bytes]:
    """Publish a task and send a command in one packet, while the workers wait; Redis's answers."""
    wait_idle(testbed)
    name = f"chaos-packet-{testbed.events.count('sent'):06d}"
    message = build_message(testbed, name)
    with socket.create_connection(("127.0.0.1", testbed.redis.port), GO_ON_SECONDS) as connection:
        reader = connection.makefile("rb")
        connection.sendall(encode_command("AUTH", testbed.redis.password))
        assert reader.readline() == b"+OK\r\n"
        commands = ["LPUSH", QUEUE, message], ["LLEN", QUEUE], command
        connection.sendall(b"".join(encode_command(*words) for words in commands))
        answers = [reader.readline() for _ in range(3)]
    assert answers[0].startswith(b":"), answers
    if testbed.plan.subject == STOCK and answers[1] != b":0\r\n":
        testbed.remarks.append(NOBODY_WAITED)
    os.environ["CHAOS_EVENTS"] = str(testbed.events.directory)
    record("sent", name)
    return answers


def encode_command(*words: str) -> bytes:
    """A command as it is on the wire."""
    parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


def build_message(testbed: ProcessTestbed, name: str) -> str:
    """A task's message, sent to another queue by plain Celery, and readdressed."""
    with Celery("plain", broker=testbed.redis.url(), set_as_current=False) as app:
        app.send_task("chaos.work", (0.01,), task_id=name, queue="spare")
    fields = json.loads(str(testbed.redis.client().rpop("spare")))
    fields["properties"]["delivery_info"]["routing_key"] = QUEUE
    return json.dumps(fields)


def wait_idle(testbed: ProcessTestbed) -> None:
    """Wait until no node runs a task, and until stock nodes wait in a blocking command, as CLIENT LIST shows."""
    done = partial(have_all_ended, testbed)
    with suppress(GaveUp):
        testbed.wait(done, testbed.plan.lease, "what was sent has ended")
    if testbed.plan.subject == STOCK:
        with suppress(GaveUp):
            testbed.wait(lambda: count_blocked(testbed) >= NODES, READY_SECONDS / 4, "every node waits")


def have_all_ended(testbed: ProcessTestbed) -> bool:
    return testbed.events.tasks("sent") <= testbed.events.tasks("end")


def count_blocked(testbed: ProcessTestbed) -> int:
    """Connections that wait in a blocking command."""
    return sum(1 for client in testbed.redis.client().client_list() if "b" in client["flags"])
