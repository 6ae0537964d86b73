"""Connections of Celery over this transport: kombu's, which choose it for every Redis URL.

`broker_transport` would not do: kombu 5.7 takes the transport of a redis+socket:// URL from the URL.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import kombu
from celery.app import amqp
from kombu import Queue, connection
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis

from services.broker.client import LateConfigError
from services.broker.retry import RetryState, ignore_soft_time_limit, retry_commands, run_with_retry
from services.delivery.transport import SentinelTransport, Transport

TRANSPORTS = {kombu_redis.Transport: Transport, kombu_redis.SentinelTransport: SentinelTransport}
# Transport options that kombu's connection reads itself, for any transport (kombu 5.7).
CONNECTION_OPTIONS = (
    "callback",
    "connect_retries_timeout",
    "errback",
    "interval_max",
    "interval_start",
    "interval_step",
    "max_retries",
)
# What to do in place of an option that kombu's Redis transport reads and ours does not.
ADVICE = {
    "global_keyprefix": "give each application a Redis database of its own",
    "polling_interval": "messages are waited for without polling",
    "priority_steps": "the priorities 0, 3, 6 and 9 have lists of their own, and those between go with them",
    "queue_order_strategy": "queues take turns; what is urgent has a priority, or a worker of its own",
    "unacked_restore_interval": "WORKER_LEASE says how soon the tasks of a dead worker are back",
    "unacked_restore_throttle": "WORKER_LEASE says how soon the tasks of a dead worker are back",
}


class Connection(kombu.Connection):  # type: ignore[misc]
    """A broker connection with this transport.

    Raises UnreadOptions for transport options that would be ignored: a key prefix, for instance, would not be there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        transport = self.get_transport_cls()
        if not issubclass(transport, Transport):
            return
        read = {*transport.Channel.from_transport_options, *CONNECTION_OPTIONS}
        if ignored := [name for name in self.transport_options if name not in read]:
            raise UnreadOptions(ignored, read)

    def get_transport_cls(self) -> Any:
        chosen = super().get_transport_cls()
        return TRANSPORTS.get(chosen, chosen)

    def Pool(self, limit: int | None = None, **options: Any) -> Any:  # noqa: N802 - kombu's name
        """A pool of connections of this class; kombu's would have connections of kombu's class."""
        return Pool(self, limit, **options)


class UnreadOptions(LateConfigError):
    """There are transport options that nothing reads."""

    def __init__(self, ignored: Iterable[str], read: Iterable[str]) -> None:
        problems = []
        for name in sorted(ignored):
            hint = ADVICE.get(name) or next((f"did you mean {near}?" for near in get_close_matches(name, read, 1)), "")
            problems.append(f"{name} ({hint})" if hint else name)
        them = "them" if problems[1:] else "it"
        super().__init__(f"broker_transport_options: Stalk does not read {', '.join(problems)}: take {them} out")


class PooledConnection(connection.PooledConnection, Connection):  # type: ignore[misc]
    """A connection of a pool."""


class Pool(connection.ConnectionPool):  # type: ignore[misc]
    """A pool of connections with this transport."""

    def new(self) -> PooledConnection:
        return PooledConnection(self, **dict(self.connection._info(resolve=False)))


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """The part of an application that publishes and consumes."""

    Connection = Connection

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()

        def send_task(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if queue := self._fanout_queue(**options):
                # Celery does not declare a Broadcast's exchange, and kombu takes one that it does not know for a direct
                # one: the message would go to lists that nobody reads. Nor does Celery give a routing key where it is
                # given an exchange, and nodes listen to that of their queue (celery 5.7, kombu 5.7).
                options |= {"queue": queue, "exchange": None, "declare": options.get("declare") or [queue.exchange]}
            # What a task sends is part of it: that is retried while Redis is away or full, as its result is.
            with retry_commands(f"a message for {name}"):
                # Apart: kombu gives up the first connection of a process after four seconds (celery 5.7).
                run_with_retry(lambda: _connect(producer))
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
        if RetryState.in_worker:
            with ignore_soft_time_limit():
                return publish(*arguments, **options)
        return super()._retry_publish(publish, *arguments, **options)


def _connect(producer: Any) -> Any:
    """Have a producer connect. Raises what redis-py does."""
    try:
        return producer.channel
    except OperationalError as error:
        raise error.__cause__ or error from None
