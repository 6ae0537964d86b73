"""The kombu transport: its channel, and the poller that waits for all channels."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.utils.eventio import READ
from redis.exceptions import RedisError

from services.delivery.channel import Channel, SentinelChannel
from services.delivery.unacked import UnackedDeliveries


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, for channels that claim.

    Other threads can wake it, so that prefetch credit that becomes free is used at once.
    """

    def __init__(self) -> None:
        super().__init__()
        # Whether an event loop calls it; without one `get` does all.
        self.looped = False
        self._wake_up_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_up_lock = threading.Lock()
        self._registered_with: Any = None
        # Those that wake this poller when prefetch credit becomes free.
        self._subscribed: set[UnackedDeliveries] = set()
        # Takes this poller, and the file descriptor that wakes it, out of the event loop.
        self.leave_loop: Callable[[int], None] = lambda fd: None

    def wake_up(self) -> None:
        """Wake whoever polls. May be called from any thread."""
        with self._wake_up_lock:
            if self._wake_up_fd >= 0:
                os.eventfd_write(self._wake_up_fd, 1)

    def close(self) -> None:
        for channel in list(self._channels):
            self.discard(channel)
        super().close()
        while self._subscribed:
            self._subscribed.pop().remove_credit_listener(self.wake_up)
        # A number that is closed may be somebody else's the moment after.
        with self._wake_up_lock:
            fd, self._wake_up_fd = self._wake_up_fd, -1
            if fd >= 0:
                self.leave_loop(fd)
                os.close(fd)

    def __del__(self) -> None:
        # kombu closes no transport that has never been connected, such as one whose Redis was away (kombu 5.7).
        self.close()

    def _on_connection_disconnect(self, connection: Any) -> None:
        super()._on_connection_disconnect(connection)
        # kombu forgets a connection where an event loop runs, and elsewhere keeps its channel (kombu 5.7).
        self._forget({key for key in list(self._chan_to_sock) if key[1].connection is connection})

    def discard(self, channel: Any) -> None:
        """Forget a channel that is about to close its connections, whose numbers may be somebody else's then."""
        super().discard(channel)
        for fileno in [fileno for fileno, (owner, _) in self._fd_to_chan.items() if owner is channel]:
            self._unregister_from_poll(fileno)
        self._forget({key for key in self._chan_to_sock if key[0] is channel})

    def _forget(self, gone: set[tuple[Any, Any, str]]) -> None:
        for channel, client, kind in gone:
            del self._chan_to_sock[channel, client, kind]
            for fileno in [fileno for fileno, owner in list(self._fd_to_chan.items()) if owner == (channel, kind)]:
                del self._fd_to_chan[fileno]

    @property
    def fds(self) -> dict[int, Any]:
        return {**super().fds, **({self._wake_up_fd: (None, "WAKE_UP")} if self._wake_up_fd >= 0 else {})}

    def on_poll_init(self, poller: Any) -> None:
        self.looped = True
        self.poller = poller

    def on_poll_start(self) -> None:
        for channel in list(self._channels):
            if channel.delivers:
                self._subscribe(channel.deliveries)
                channel.check_claim()
        super().on_poll_start()

    def _subscribe(self, deliveries: UnackedDeliveries) -> None:
        if deliveries not in self._subscribed:
            deliveries.add_credit_listener(self.wake_up)
            self._subscribed.add(deliveries)

    def on_readable(self, fileno: int) -> Any:
        if fileno == self._wake_up_fd:
            os.eventfd_read(self._wake_up_fd)
            return None
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        if kind == "BRPOP" and channel.delivers and not channel._in_poll and fileno not in self._paused_brpop:
            # kombu would take it for the end of the connection.
            channel.read_unrequested()
            return None
        if kind == "LISTEN":
            # A broadcast takes no credit; without any, kombu would not read it, and turn for ever (kombu 5.7).
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Deliver one message, or raise Empty after `timeout` seconds or earlier; the transport then asks again."""
        for channel in list(self._channels):
            if channel.has_backlog:
                channel.deliver()
                return
        if self._registered_with is not self.poller:
            self.poller.register(self._wake_up_fd, READ)
            self._registered_with = self.poller
        limits = [timeout, *(channel.max_wait_seconds for channel in self._channels)]
        super().get(callback, min((seconds for seconds in limits if seconds is not None), default=None))

    def handle_event(self, fileno: int, event: int) -> Any:
        if fileno == self._wake_up_fd:
            self.on_readable(fileno)
            raise Empty
        return super().handle_event(fileno, event)

    def deliver_commands(self) -> None:
        """Deliver the remote control commands that have come; tasks come after them."""
        for channel in list(self._channels):
            channel.deliver_commands()

    def maybe_restore_messages(self) -> None:
        """Do nothing: the lease manager sweeps."""

    def maybe_refresh_binding_expiry(self) -> None:
        """Called each second: keep alive what expires; where Redis refuses that, the next second will do."""
        for channel in list(self._channels):
            # kombu would log a traceback each time (kombu 5.7).
            with suppress(RedisError, OSError):
                channel.maybe_refresh_binding_expiry()


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """redis://, rediss:// and redis+socket://"""

    Channel = Channel

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.cycle = Poller()
        # Of all its channels: queue → exchange and routing key.
        self.fanout_queues: dict[str, tuple[str, str]] = {}

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        before = loop.on_tick.copy()
        super().register_with_event_loop(connection, loop)
        ticks = loop.on_tick - before

        def leave(fd: int) -> None:
            # kombu would have it turn for ever, with each of its predecessors (kombu 5.7).
            loop.on_tick.difference_update(ticks)
            loop.remove(fd)

        self.cycle.leave_loop = leave

    def _reject_inbound_message(self, raw_message: dict[str, Any]) -> None:
        """Requeue what has come for a consumer that is gone."""
        tag, info = (raw_message["properties"].get(name) for name in ("delivery_tag", "delivery_info"))
        for channel in self.channels[:1]:
            if channel.deliveries.holds(tag):
                channel.deliveries.requeue([tag])
            elif info and channel.typeof(info["exchange"]).type != "fanout":
                # It was taken as kombu takes what needs no acknowledgement.
                channel._do_restore_message(raw_message, info["exchange"], info["routing_key"], channel._commands)


class SentinelTransport(Transport):
    """sentinel://"""

    Channel = SentinelChannel
    default_port = kombu_redis.SentinelTransport.default_port
