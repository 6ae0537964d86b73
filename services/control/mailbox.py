"""The mailbox of remote control: who asks all nodes goes on as soon as all have answered, not after the whole time-out.

Redis says how many nodes receive a command; where none does, no answer is waited for. A node that does not answer,
because its pool is solo and runs a task, is waited for as long as with Celery.

Revocations are kept in Redis before they are broadcast, and a node reads them whenever it begins to listen.
"""

import logging
from functools import partial
from typing import Any

from celery.app import control
from kombu import Producer, pidbox
from kombu.exceptions import EncodeError
from redis.exceptions import RedisError

from services.broker.client import UNREACHABLE, format_error
from services.control import revocations
from services.control.task_commands import load_revocations

# Not Celery's, which logs nothing in a program that has not set up logging.
logger = logging.getLogger(__name__)


class Node(pidbox.Node):  # type: ignore[misc]
    """The mailbox of a node, which receives the next command whatever the last one was."""

    def listen(self, channel: Any = None, callback: Any = None) -> Any:
        consumer = super().listen(channel, callback)

        def load() -> None:
            with consumer.channel.conn_or_acquire() as client:
                load_revocations(self.state, client)

        # Now, before the first task; and when Redis has confirmed the subscription, because what was revoked in between
        # was not broadcast to this node.
        load()
        consumer.channel.on_subscribed = load
        return consumer

    def handle_message(self, body: Any, message: Any = None) -> Any:
        """Run a command, and answer.

        An error that leaves this makes Celery close the channel, and the next commands are lost (celery 5.7).
        """
        try:
            return super().handle_message(body, message)
        except Exception as error:  # whatever kombu raises at somebody's command, or Redis at the answer to it
            logger.error("control: a command, or the answer to it, is dropped: %r", error)

    def reply(self, data: Any, *address: Any, **options: Any) -> None:
        """Send an answer; where it cannot be encoded, the error."""
        try:
            super().reply(data, *address, **options)
        except EncodeError as error:
            super().reply({self.hostname: {"error": repr(error)}}, *address, **options)


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """Sends commands to nodes, and collects their answers."""

    node_cls = Node

    def _publish(
        self, command: str, arguments: Any, *, channel: Any = None, producer: Any = None, **options: Any
    ) -> Any:
        channel = channel or self.connection.default_channel
        # Revocations for some nodes only are kept by those nodes.
        if command in revocations.COMMANDS and not options.get("destination") and not options.get("pattern"):
            _, channel = self.connection.autoretry(partial(_store, command, arguments), channel)()
        # On the channel that receives the answers: `_collect` asks that one how many nodes have heard the command.
        producer = producer or Producer(channel, auto_declare=False)
        return super()._publish(command, arguments, channel=channel, producer=producer, **options)

    def _collect(
        self, ticket: Any, limit: int | None = None, timeout: float | None = 1, channel: Any = None, **options: Any
    ) -> Any:
        if channel is not None and channel.connection is None:
            # It was closed with its connection, and the command sent again over another one.
            channel = self.connection.default_channel
        heard = getattr(channel, "heard", None)
        timeout = 0 if heard == 0 else timeout
        return super()._collect(ticket, limit=limit or heard, timeout=timeout, channel=channel, **options)


def _store(command: str, arguments: Any, channel: Any) -> None:
    """Keep in Redis what a command revokes; where Redis refuses that, it can still be broadcast."""
    try:
        with channel.conn_or_acquire() as client:
            revocations.store_command(client, command, arguments)
    except UNREACHABLE:
        raise
    except RedisError as error:
        logger.warning(
            "%s is not kept in Redis: only nodes that hear it now know of it: %s", command, format_error(error)
        )


class Control(control.Control):  # type: ignore[misc]
    """`app.control`, with Stalk's mailbox."""

    Mailbox = Mailbox
