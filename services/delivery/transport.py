"""The kombu transport: which channel, which poller."""

from __future__ import annotations

import os
import threading
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.utils.eventio import READ

from services.delivery.channel import Channel, SentinelChannel
from services.delivery.holder import Holder


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, for channels that claim. Other threads can wake it: a place that becomes free is used at once."""

    def __init__(self) -> None:
        super().__init__()
        # Whether an event loop calls us; without one `get` does all.
        self.looped = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bell_lock = threading.Lock()
        self._registered_with: Any = None
        # Those that ring when a place becomes free.
        self._holders: set[Holder] = set()

    def ring(self) -> None:
        """Wake whoever polls. May be called from any thread."""
        with self._bell_lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        super().close()
        while self._holders:
            self._holders.pop().ring_no_more(self.ring)
        # A number that is closed may be somebody else's the moment after.
        with self._bell_lock:
            bell, self._bell = self._bell, -1
            if bell >= 0:
                os.close(bell)

    @property
    def fds(self) -> dict[int, Any]:
        return {**super().fds, **({self._bell: (None, "BELL")} if self._bell >= 0 else {})}

    def on_poll_init(self, poller: Any) -> None:
        self.looped = True
        self.poller = poller

    def on_poll_start(self) -> None:
        for channel in list(self._channels):
            if channel.delivers:
                self._listen_to(channel.holder)
                channel.look()
        super().on_poll_start()

    def _listen_to(self, holder: Holder) -> None:
        if holder not in self._holders:
            holder.ring_for_credit(self.ring)
            self._holders.add(holder)

    def on_readable(self, fileno: int) -> Any:
        if fileno == self._bell:
            os.eventfd_read(self._bell)
            return None
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        if kind == "BRPOP" and channel.delivers and not channel._in_poll and fileno not in self._paused_brpop:
            # kombu would take it for the end of the connection.
            channel.absorb()
            return None
        return super().on_readable(fileno)

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Deliver one message, or raise Empty after `timeout` seconds or earlier; the transport then asks again."""
        for channel in list(self._channels):
            if channel.has_backlog:
                channel.deliver()
                return
        if self._registered_with is not self.poller:
            self.poller.register(self._bell, READ)
            self._registered_with = self.poller
        patience = [timeout, *(channel.patience for channel in self._channels)]
        super().get(callback, min((seconds for seconds in patience if seconds is not None), default=None))

    def handle_event(self, fileno: int, event: int) -> Any:
        if fileno == self._bell:
            self.on_readable(fileno)
            raise Empty
        return super().handle_event(fileno, event)

    def hear(self) -> None:
        """Deliver the commands to this node that have come; its tasks come after them."""
        for channel in list(self._channels):
            channel.hear()

    def maybe_restore_messages(self) -> None:
        """Nothing: the keeper sweeps."""

    def maybe_check_brpop_health(self) -> None:
        """Nothing: a channel looks for itself."""


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """redis://, rediss:// and redis+socket://"""

    Channel = Channel

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.cycle = Poller()


class SentinelTransport(Transport):
    """sentinel://"""

    Channel = SentinelChannel
    default_port = kombu_redis.SentinelTransport.default_port
