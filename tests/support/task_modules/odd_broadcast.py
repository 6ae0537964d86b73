"""A broadcast for the tests' workers: a fanout exchange, to which each node binds a queue of its own."""

from celery import current_app
from kombu import Queue
from kombu.common import Broadcast

current_app.conf.task_queues = (
    *(Queue(name) for name in ("prefork", "threads", "solo")),
    Broadcast("everybody"),
    Queue("unacknowledged", no_ack=True),
)
