"""How Celery comes to our transport: its connections are kombu's, but choose it for every URL of Redis.

`broker_transport` would not do: kombu 5.7 takes the transport of a redis+socket:// URL from the URL.
"""

from __future__ import annotations

from typing import Any

import kombu
from celery.app import amqp
from kombu import connection
from kombu.transport import redis as kombu_redis

from services.delivery.transport import SentinelTransport, Transport

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
