"""Asking nodes: whoever asks all of them goes on as soon as all have answered, not when the time for answers is over.

Redis says how many nodes hear a question; where none does, nobody is waited for. One that hears and does not answer,
because its pool is solo and runs a task, is waited for as long as with Celery.
"""

from __future__ import annotations

from typing import Any

from celery.app import control
from celery.utils.log import get_logger
from kombu import Producer, pidbox
from kombu.exceptions import EncodeError

logger = get_logger(__name__)


class Node(pidbox.Node):  # type: ignore[misc]
    """The mailbox of a node, which goes on hearing whatever somebody has put into it."""

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

    def _publish(self, *arguments: Any, channel: Any = None, producer: Any = None, **options: Any) -> Any:
        channel = channel or self.connection.default_channel
        # On the channel that the answers are awaited on: another one would keep to itself how many have heard it.
        producer = producer or Producer(channel, auto_declare=False)
        return super()._publish(*arguments, channel=channel, producer=producer, **options)

    def _collect(
        self, ticket: Any, limit: int | None = None, timeout: float | None = 1, channel: Any = None, **options: Any
    ) -> Any:
        if channel is not None and channel.connection is None:
            # It was closed with its connection, and the question asked again over another one.
            channel = self.connection.default_channel
        heard = getattr(channel, "heard", None)
        timeout = 0 if heard == 0 else timeout
        return super()._collect(ticket, limit=limit or heard, timeout=timeout, channel=channel, **options)


class Control(control.Control):  # type: ignore[misc]
    """`app.control`."""

    Mailbox = Mailbox
