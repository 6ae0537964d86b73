"""How Celery comes to our transport: its connections are kombu's, but choose it for every URL of Redis.

`broker_transport` would not do: kombu 5.7 takes the transport of a redis+socket:// URL from the URL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kombu
from celery.app import amqp
from kombu import Queue, connection
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis

from services.delivery.transport import SentinelTransport, Transport
from services.patience import Patience, insist, patience, task_ended

TRANSPORTS = {kombu_redis.Transport: Transport, kombu_redis.SentinelTransport: SentinelTransport}


class Connection(kombu.Connection):  # type: ignore[misc]
    """A broker connection over which deliveries are ours."""

    def get_transport_cls(self) -> Any:
        chosen = super().get_transport_cls()
        return TRANSPORTS.get(chosen, chosen)

    def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802 - kombu's name
        """Connections to share; kombu's own pool would make them from kombu's own class."""
        return Pool(self, limit, **options)


class PooledConnection(connection.PooledConnection, Connection):  # type: ignore[misc]
    """One of a pool."""


class Pool(connection.ConnectionPool):  # type: ignore[misc]
    """A pool of such connections."""

    def new(self) -> PooledConnection:
        return PooledConnection(self, **dict(self.connection._info(resolve=False)))


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """What an application publishes and consumes with."""

    Connection = Connection

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()

        def send_task(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if queue := self._fanout_queue(**options):
                # Celery does not declare a Broadcast's exchange, and kombu takes one that it does not know for a direct
                # one: the message would go to lists that nobody reads. Nor does Celery give a routing key where it is
                # given an exchange, and nodes listen to that of their queue (celery 5.7, kombu 5.7).
                options |= {"queue": queue, "exchange": None, "declare": options.get("declare") or [queue.exchange]}
            # What a task sends is part of it: it waits for a Redis that is away or full, as its result does.
            with patience(f"a message for {name}"):
                # Apart: kombu gives up the first connection of a process after four seconds (celery 5.7).
                insist(lambda: _connect(producer))
                return send(producer, name, message, **options)

        return send_task

    def _fanout_queue(self, queue: Any = None, exchange: Any = None, **_: Any) -> Any:
        """The queue of the fanout exchange that these options of a message name; None where they name none."""
        name = getattr(exchange, "name", exchange)
        for each in list(self.queues.values()) if name else [queue]:
            if isinstance(each, Queue) and each.exchange.type == "fanout" and (not name or name == each.exchange.name):
                return each
        return None

    def _retry_publish(self, publish: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Publish what follows a task: its callbacks, the next link of its chain, the body of its chord.

        Celery tries three times, for less than a second, and then fails the task or the chord (celery 5.7).
        """
        if Patience.in_worker:
            with task_ended():
                return publish(*arguments, **options)
        return super()._retry_publish(publish, *arguments, **options)


def _connect(producer: Any) -> Any:
    """Have a producer connect. Raises what redis-py does."""
    try:
        return producer.channel
    except OperationalError as error:
        raise error.__cause__ or error from None
