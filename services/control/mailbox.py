"""Asking nodes: whoever asks all of them goes on as soon as all have answered, not when the time for answers is over.

Redis says how many nodes hear a question; where none does, nobody is waited for. One that hears and does not answer,
because its pool is solo and runs a task, is waited for as long as with Celery.

What is revoked is kept in Redis before the nodes are told, and read by each of them whenever it begins to listen.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery.app import control
from kombu import Producer, pidbox
from kombu.exceptions import EncodeError
from redis.exceptions import RedisError

from services.broker.client import UNREACHABLE, format_error
from services.control import revoked
from services.control.task_commands import learn_revoked

# Not Celery's, which says nothing in a program that has not set up logging.
logger = logging.getLogger(__name__)


class Node(pidbox.Node):  # type: ignore[misc]
    """The mailbox of a node, which goes on hearing whatever somebody has put into it."""

    def listen(self, channel: Any = None, callback: Any = None) -> Any:
        consumer = super().listen(channel, callback)
        learn = partial(self._learn, consumer.channel)
        # Now, before the first task; and when Redis has confirmed that it will tell us: what was revoked in between
        # was told to nobody here.
        learn()
        consumer.channel.on_subscribed = learn
        return consumer

    def _learn(self, channel: Any) -> None:
        with channel.conn_or_acquire() as client:
            learn_revoked(self.state, client)

    def handle_message(self, body: Any, message: Any = None) -> Any:
        """Do what a command says, and answer.

        After an error that comes out of here Celery hangs up, and the next commands are for nobody (celery 5.7).
        """
        try:
            return super().handle_message(body, message)
        except Exception as error:  # whatever somebody's command, or Redis at the answer to it, makes kombu raise
            logger.error("control: a command, or the answer to it, is dropped: %r", error)

    def reply(self, data: Any, *address: Any, **options: Any) -> None:
        """Answer; with the reason why not, where the answer cannot be sent."""
        try:
            super().reply(data, *address, **options)
        except EncodeError as error:
            super().reply({self.hostname: {"error": repr(error)}}, *address, **options)


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """Where questions are put and answers come in."""

    node_cls = Node

    def _publish(
        self,
        command: str,
        arguments: Any,
        *,
        destination: Any = None,
        channel: Any = None,
        producer: Any = None,
        pattern: Any = None,
        **options: Any,
    ) -> Any:
        channel = channel or self.connection.default_channel
        # What only some nodes are to know is kept by those that hear it.
        if command in revoked.COMMANDS and not destination and not pattern:
            _, channel = self.connection.autoretry(partial(_keep, command, arguments), channel)()
        # On the channel that the answers are awaited on: another one would keep to itself how many have heard it.
        producer = producer or Producer(channel, auto_declare=False)
        return super()._publish(
            command,
            arguments,
            destination=destination,
            channel=channel,
            producer=producer,
            pattern=pattern,
            **options,
        )

    def _collect(
        self, ticket: Any, limit: int | None = None, timeout: float | None = 1, channel: Any = None, **options: Any
    ) -> Any:
        if channel is not None and channel.connection is None:
            # It was closed with its connection, and the question asked again over another one.
            channel = self.connection.default_channel
        heard = getattr(channel, "heard", None)
        timeout = 0 if heard == 0 else timeout
        return super()._collect(ticket, limit=limit or heard, timeout=timeout, channel=channel, **options)


def _keep(command: str, arguments: Any, channel: Any) -> None:
    """Keep what a command revokes; a Redis that refuses that can still tell the nodes."""
    try:
        with channel.conn_or_acquire() as client:
            revoked.keep_command(client, command, arguments)
    except UNREACHABLE:
        raise
    except RedisError as error:
        logger.warning(
            "%s is not kept in Redis: only nodes that hear it now know of it: %s", command, format_error(error)
        )


class Control(control.Control):  # type: ignore[misc]
    """`app.control`."""

    Mailbox = Mailbox
