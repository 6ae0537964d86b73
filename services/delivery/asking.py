"""Asking nodes: whoever asks all of them goes on as soon as all have answered, not when the time for answers is over.

Redis says how many nodes hear a question; where none does, nobody is waited for. One that hears and does not answer,
because its pool is solo and runs a task, is waited for as long as with Celery.
"""

from __future__ import annotations

from typing import Any

from celery.app import control
from kombu import Producer, pidbox


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """Where questions are put and answers come in."""

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
