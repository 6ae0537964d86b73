"""How Celery comes to our transport: its connections are kombu's, but choose it for every URL of Redis.

`broker_transport` would not do: kombu 5.7 takes the transport of a redis+socket:// URL from the URL.
"""

from __future__ import annotations

from typing import Any

import kombu
from celery.app import amqp
from kombu.transport import redis as kombu_redis

from services.delivery.transport import SentinelTransport, Transport

TRANSPORTS = {kombu_redis.Transport: Transport, kombu_redis.SentinelTransport: SentinelTransport}


class Connection(kombu.Connection):  # type: ignore[misc]
    """A broker connection over which deliveries are ours."""

    def get_transport_cls(self) -> Any:
        chosen = super().get_transport_cls()
        return TRANSPORTS.get(chosen, chosen)


class AMQP(amqp.AMQP):  # type: ignore[misc]
    """What an application publishes and consumes with."""

    Connection = Connection
