"""The kombu channel: consuming by claims, and publishing that is retried.

It ends with its connection; the deliveries that it has claimed do not, and are in unacked.py.
"""

import os
import threading
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from queue import Empty
from typing import Any

from celery.utils.log import get_logger
from kombu.exceptions import InconsistencyError
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.objects import cached_property
from redis.exceptions import RedisError

from services.broker import headroom, scripts
from services.broker.client import describe_server
from services.broker.keys import PUBLISHED, carries_tasks
from services.broker.outages import Outage
from services.broker.retry import retry_commands, run_with_retry
from services.delayed import rate_limits, scheduled
from services.delivery import registry
from services.delivery.claim import (
    MOST,
    Claim,
    ClaimConnection,
    ClaimedMessage,
    ClaimIds,
    Refused,
    claim_command,
    parse_reply,
)
from services.delivery.unacked import REJECTED, REJECTS, RETRIES, UNDECODABLE, UnackedDeliveries, clock
from services.results.chord_deduplication import message_name

logger = get_logger(__name__)

# A producer gives up a publish, or has got it through, long before; and its thread needs only one mark.
PUBLISHED_SECONDS = 3600
# Whoever asks nodes takes an answer as it comes: this one has been given up long ago, or its process has died.
ANSWER_MILLISECONDS = 600_000
# The reply to a claim under way when its channel closes has come by then, or never comes.
LAST_ANSWER_SECONDS = 1.0
# Of kombu's transport options those that mean here what they mean there; Connection refuses the others (kombu 5.7).
KOMBU_OPTIONS = (
    "body_encoding",
    "client_name",
    "deadletter_queue",
    "fanout_patterns",
    "fanout_prefix",
    "health_check_interval",
    "max_connections",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_keepalive_options",
    "socket_timeout",
    "visibility_timeout",
)
SENTINEL_OPTIONS = ("master_name", "min_other_sentinels", "sentinel_fanout_compat", "sentinel_kwargs")
OPTIONS = ("lease", "max_deliveries", "max_requeues", "dead_letters", "dead_letters_max")
# What the scripts write first into a message (lua/record.lua).
COUNTS = ("delivery_count", "requeue_count")


class PublishTag(str):
    """The delivery tag of a message that this process publishes.

    kombu repeats a publish with the same properties: a tag of this type says that it was tried before, while the
    plain string in a message that was received, and is sent on, does not.
    """

    __slots__ = ()


class _ProducerId:
    """Names this process among all that publish; a child that was forked gets a name of its own."""

    value = ""

    @classmethod
    def renew(cls) -> None:
        cls.value = uuid.uuid4().hex[:16]


_ProducerId.renew()
os.register_at_fork(after_in_child=_ProducerId.renew)


class NoMessage(ValueError):
    """What was received does not have the form of a message."""


class Message(virtual.Message):  # type: ignore[misc]
    """A message. Raises NoMessage where kombu raises any error."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel, **options)
        except Exception as error:
            raise NoMessage(repr(error)) from error


class QoS(virtual.QoS):  # type: ignore[misc]
    """Prefetch limits and acknowledgements, by what this process has claimed and not acknowledged."""

    def can_consume(self) -> bool:
        return not self.prefetch_count or self.credit() > 0

    def can_consume_max_estimate(self) -> int:
        return max(0, self.credit())

    def credit(self) -> int:
        """How many more messages may be claimed."""
        if not self.prefetch_count:
            return MOST
        channel = self.channel
        used = channel.deliveries.count_used(channel.number) if channel.delivers else 0
        return int(self.prefetch_count) - used

    def append(self, message: Any, delivery_tag: str) -> None:
        """Do nothing: the claim has recorded it."""

    def ack(self, delivery_tag: str) -> None:
        self.channel.deliveries.ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue:
            self.channel.deliveries.requeue([delivery_tag])
        else:
            self.channel.deliveries.reject(delivery_tag, REJECTED, "rejected by its consumer")

    def restore_unacked(self) -> None:
        self.channel.deliveries.requeue_channel(self.channel.number)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Do nothing: `Channel.close` requeues what has not been started."""
        # Until then it keeps this object, its channel and all that belongs to that.
        self._on_collect.cancel()

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Do nothing: the lease manager sweeps."""


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """A channel to one Redis."""

    # To the checker, which knows nothing of kombu's.
    _sentinel_manager: Any
    _async_sentinel_manager: Any

    QoS, Message = QoS, Message
    from_transport_options: tuple[str, ...] = KOMBU_OPTIONS + OPTIONS
    lease = 60
    max_deliveries = 5
    max_requeues = 100
    dead_letters: tuple[str, ...] | list[str] = (RETRIES, REJECTS)
    dead_letters_max = 10_000
    _numbers = count(1)
    # How many heard what this channel broadcast last; None: it has broadcast nothing.
    heard: int | None = None
    # Called whenever this channel has subscribed to broadcasts: what was broadcast before is lost. redis-py connects
    # again without saying so (redis-py 8.1).
    on_subscribed: Callable[[], None] | None = None
    # Of whatever consumes here: all channels of this process, and those that come after them.
    outage = Outage("consumer", logger.warning)
    # The socket that was subscribed when that was called last.
    _subscribed_on: Any = None

    def __init__(self, connection: Any, **keywords: Any) -> None:
        self.number = next(self._numbers)
        # Whether this channel consumes anything but commands, their answers, and what is broadcast.
        self.delivers = False
        # kombu has them of the whole process, and forgets none: each reconnect and each receiver of events adds one.
        self._fanout_queues = connection.fanout_queues
        self._backlog: deque[ClaimedMessage] = deque()
        self._claim_connection: ClaimConnection | None = None
        # When queues that expire are kept alive again, by `clock`.
        self._keep_queues_at = 0.0
        try:
            super().__init__(connection, **keywords)
        except BaseException:
            # kombu keeps the number of a channel that did not come to be, and has 65535 of them (kombu 5.7).
            if number := self.__dict__.get("channel_id"):
                connection._used_channel_ids.remove(number)
            raise

    @cached_property  # type: ignore[untyped-decorator]
    def deliveries(self) -> UnackedDeliveries:
        """What this process holds of this broker; it outlives the channel."""
        return registry.deliveries_of(self)

    @cached_property  # type: ignore[untyped-decorator]
    def _claim_ids(self) -> ClaimIds:
        return ClaimIds()

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **options: Any) -> None:
        if options.get("_publish_batch") is not None:
            super()._put_fanout(exchange, message, routing_key, **options)
            return
        headers, tag = message.get("headers") or {}, message["properties"]["delivery_tag"]
        if carries_tasks(exchange) and (retry := headers.get("retries")):
            # Each node that has run it may ask for that, and all nodes would run what each of them has sent.
            mark = f"{PUBLISHED}{headers.get('id')}:{retry}:{exchange}"
            first = partial(self._commands.set, mark, tag, nx=True, ex=PUBLISHED_SECONDS)
            if not run_with_retry(first, self._get_commands) and bytes_to_str(self._commands.get(mark)) != tag:
                logger.info("%s: another node has sent retry %s of it to all", headers.get("id"), retry)
                return
        text, topics = dumps(message), self._get_publish_topics(exchange, routing_key)
        with self.conn_or_acquire() as client:
            # Of a second topic, sentinel_fanout_compat's: those that hear the first hear it as well.
            self.heard = max(
                run_with_retry(partial(client.publish, topic, text), self._get_commands) for topic in topics
            )
        if not self.heard and carries_tasks(exchange):
            logger.warning("no node hears what is broadcast to %s with routing key %s", exchange, routing_key)

    def _handle_message(self, client: Any, r: Any) -> Any:
        if self.on_subscribed and bytes_to_str(r[0]) == "psubscribe":
            self._note_subscription()
        return super()._handle_message(client, r)

    def _note_subscription(self) -> None:
        self._subscribed_on = self.subclient.connection._sock
        if self.on_subscribed:
            self.on_subscribed()

    def deliver_commands(self) -> None:
        """Deliver the remote control commands that have come, if this channel receives them."""
        if not self.on_subscribed:
            return
        with suppress(Empty):
            self._receive()
        if self.closed:
            # A command that failed: Celery listens on another channel now, and has read what was revoked.
            return
        if self._subscribed_on is not self.subclient.connection._sock:
            # Redis has still to confirm that; what comes now was told to nobody here.
            self._note_subscription()

    def _receive(self) -> Any:
        # What the poller saw may have been heard since, and kombu would wait for more.
        if self.on_subscribed and not self._has_broadcast():
            return None
        return super()._receive()

    def _receive_one(self, client: Any) -> Any:
        try:
            return super()._receive_one(client)
        except RecursionError as error:
            # Left to itself, it ends the worker.
            logger.error("what was broadcast is not a message: %r", error)
            return None

    def _has_broadcast(self) -> bool:
        try:
            return bool(self.subclient.connection.can_read(0))
        except self.connection_errors:
            # That is news, too: whoever reads connects again.
            return True

    # Connections.

    @cached_property  # type: ignore[untyped-decorator]
    def client(self) -> Any:
        """The client whose connection claims. It speaks RESP3, in which Redis may speak first."""
        pool = self._get_pool(asynchronous=True)
        pool.connection_kwargs["protocol"] = 3
        # That of the subscriptions comes with sentinels of its own.
        self._claim_pool, self._claim_sentinels = pool, self._async_sentinel_manager
        return self.Client(connection_pool=pool)

    def _get_client(self) -> type[headroom.Client]:
        return headroom.Client

    @cached_property  # type: ignore[untyped-decorator]
    def _commands(self) -> Any:
        return self._create_client()

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Any:
        # kombu makes a client for each command.
        yield client or self._commands

    def create_pool(self) -> Any:
        """A connection pool that does not end with this channel."""
        managers: Any = self._sentinel_manager, self._async_sentinel_manager
        pool = self._get_pool()
        self._sentinel_manager, self._async_sentinel_manager = managers
        return pool

    def _disconnect_pools(self) -> None:
        if (pool := self.__dict__.pop("_claim_pool", None)) is not None:
            pool.disconnect()
        if (sentinels := self.__dict__.pop("_claim_sentinels", None)) is not None:
            sentinels.close()
        # Its pool is not this channel's any more; in a child that was forked, the next command makes another.
        self.__dict__.pop("_commands", None)
        super()._disconnect_pools()

    # Consuming.

    def basic_consume(self, queue: str, no_ack: bool, callback: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        answer = super().basic_consume(queue, no_ack, callback, *args, **kwargs)
        if queue in self._fanout_queues:
            return answer
        if carries_tasks(queue):
            if self._in_poll and self.active_queues == [queue]:
                # kombu goes on waiting for answers that nobody expects any more, those to `mingle`, for up to a second.
                self._disconnect(self._in_poll)
            # Also without acknowledgements: kombu's own way of those ends with the first message that is none.
            self.delivers = True
            registry.start_lease_manager(self)
            # Before the first claim, which looks for how long its lists may live.
            self._maybe_update_queues_expire(self._commands, queue)
        self.connection._callbacks[queue] = self._receiver(callback, no_ack)
        return answer

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        if self._claim_connection:
            self._claim_connection.queues_changed()

    def _receiver(self, callback: Callable[[Any], Any], no_ack: bool) -> Callable[[Any], Any]:
        def receive(raw: Any) -> Any:
            try:
                message = self.Message(raw, channel=self)
            except NoMessage as error:
                tag = raw["properties"]["delivery_tag"]
                if not self.deliveries.holds(tag):
                    # It was taken as kombu takes what needs no acknowledgement.
                    raise
                self.deliveries.reject(tag, UNDECODABLE, str(error))
                return None
            if no_ack and self.deliveries.holds(message.delivery_tag):
                # From now on it is under no lease.
                self.deliveries.ack(message.delivery_tag)
                message.delivery_tag = message.properties["delivery_tag"] = str(message.delivery_tag)
            return callback(message)

        return receive

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        if exchange not in self._fanout_to_queue:
            # It was on its way when its consumer was cancelled.
            return False
        try:
            return bool(super()._deliver_fanout_message(message, exchange))
        except NoMessage as error:
            # Left to itself, it ends the worker.
            logger.error("what was broadcast to %s is not a message: %s", exchange, error)
            return False

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages. The name is kombu's: its poller calls it when there is credit and nothing under way."""
        if not self.delivers:
            super()._brpop_start(timeout)
            return
        claims = self._claim_connection = self._claim_connection or ClaimConnection(
            self.deliveries, self._claim_ids, self.number
        )
        # kombu's look at connections that have fallen silent is not for this one.
        self._brpop_sent_at = None
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or claims.is_paused:
            return
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        connection = self.client.connection
        self._in_poll = connection
        try:
            claims.send_claim(connection, queues, lists, self.qos.credit())
        except self.connection_errors:
            self._disconnect(connection)
            raise

    def _brpop_read(self, **options: Any) -> Any:
        """Read what has come on the connection that claims."""
        if not self.delivers or not self._claim_connection:
            return super()._brpop_read(**options)
        connection = self.client.connection
        try:
            found = self._claim_connection.read(connection)
        except Refused as error:
            self._log_outage(error)
            self._in_poll = None
            raise Empty from None
        except self.connection_errors as error:
            # Whether Redis itself is away shows when this is connected again.
            self._log_outage(error)
            self._disconnect(connection)
            raise Empty from None
        except BaseException:
            self._disconnect(connection)
            raise
        if not self._claim_connection.outstanding:
            self.outage.record_recovery()
        if found is None:
            raise Empty
        self._in_poll = None
        self._backlog.extend(found)
        if found:
            self._queue_cycle.rotate(found[-1].queue)
        return self.deliver()

    def _log_outage(self, error: Exception) -> None:
        """Log that this process waits for tasks, because of this error."""
        self.outage.record_failure(error, describe_server(self.client), "give tasks")

    def read_unrequested(self) -> None:
        """Read what is no reply: late notices of changed lists, or the end of the connection."""
        connection = self.client.connection
        try:
            connection.read_response(push_request=True)
        except self.connection_errors:
            self._disconnect(connection)

    def _disconnect(self, connection: Any) -> None:
        if self._claim_connection:
            self._claim_connection.reset()
        connection.disconnect()
        self._in_poll = None

    def deliver(self) -> bool:
        """Deliver what was claimed: one message, or all where an event loop runs.

        A pool without one runs the task inside, and the worker wants to look at its own state between two.
        """
        if not self._backlog:
            raise Empty
        while self._backlog:
            # Before, because a task that runs in here keeps the commands that come meanwhile waiting, as a node that
            # stands still does: the next task may be one that was revoked.
            self.connection.cycle.deliver_commands()
            if not self._backlog:
                # A command has closed this channel.
                break
            self._deliver_one(self._backlog.popleft())
            if not self.connection.cycle.looped:
                break
        return True

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlog)

    def _deliver_one(self, one: ClaimedMessage) -> None:
        if not self.deliveries.has_valid_lease(one.tag):
            return
        try:
            payload = _payload(one)
        except Exception as error:  # whatever kombu's decoders of JSON raise
            self.deliveries.reject(one.tag, UNDECODABLE, f"not a message: {error!r}")
            return
        self.connection._deliver(payload, one.queue)

    @property
    def max_wait_seconds(self) -> float | None:
        """Seconds for which the poller may wait without calling `check_claim`; None: for ever."""
        return self._claim_connection.max_wait_seconds if self._claim_connection else None

    def check_claim(self) -> None:
        """Claim again when it is time; connect again when a reply is overdue. The poller calls it at each turn."""
        claims = self._claim_connection
        if not claims or not self._in_poll:
            return
        if claims.is_overdue:
            self._log_outage(TimeoutError("it has not answered; connecting again"))
            self._disconnect(self.client.connection)
        elif claims.is_look_due:
            self._in_poll = None

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or None; claimed in one step unless it needs no acknowledgement."""
        if no_ack:
            return super().basic_get(queue, no_ack=no_ack, **kwargs)
        registry.start_lease_manager(self)
        self._maybe_update_queues_expire(self._commands, queue)
        claim = Claim(self._claim_ids.next(), 1, (queue,), [], clock())
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps]
        keys, arguments = claim_command(claim, lists, self.deliveries.rules.lease)
        try:
            found = parse_reply(claim, scripts.CLAIM(self._commands, keys, arguments))
        except self.connection_errors:
            self.deliveries.requeue_claim(claim.id, claim.credit)
            raise
        for one in found:
            self.deliveries.add([one.tag], self.number, claim.since)
            try:
                return self.Message(_payload(one), channel=self)
            except Exception as error:  # whatever kombu's decoders of JSON raise
                self.deliveries.reject(one.tag, UNDECODABLE, repr(error))
        return None

    def _purge(self, queue: str) -> int:
        """Delete what waits in a queue, and what waits for its time to come into it. Returns how many."""
        # What becomes due meanwhile is in a list by the time that those are emptied.
        waiting, rate_limited = scheduled.purge(self._commands, queue)
        for task in rate_limited:
            # Their tokens are free: what is left, and what comes, would wait for nothing.
            rate_limits.requeue(self._commands, task.decode())
        return waiting + int(super()._purge(queue))

    # Publishing: inside `retry_commands` each step is repeated until Redis takes it.

    def queue_declare(self, *arguments: Any, **options: Any) -> Any:
        return run_with_retry(partial(super().queue_declare, *arguments, **options), self._get_commands)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        """Store a binding; a node that starts waits with it, as what a task sends does."""
        bind = partial(super()._queue_bind, exchange, routing_key, pattern, queue)
        try:
            with retry_commands(f"the binding of {queue}"):
                run_with_retry(bind, self._get_commands)
        except BaseException:
            # kombu has noted before that it is there, and would never try again.
            self.state.binding_delete(queue, exchange, routing_key)
            raise
        # Redis has the table. kombu's own, which nobody reads, grows with each queue of answers (kombu 5.7).
        self.state.exchanges[exchange]["table"].clear()

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep the bindings of consumed queues that expire, and what waits in these."""
        queues = [queue for queue in self.active_queues if queue in self._expires]
        if queues and clock() >= self._keep_queues_at:
            for queue in queues:
                # As kombu does whenever it takes something, which a worker that is busy does not.
                self._maybe_update_queues_expire(self._commands, queue)
            self._keep_queues_at = clock() + min(self._expires[queue] for queue in queues) / 3000
        super().maybe_refresh_binding_expiry()

    def _do_restore_message(self, payload: Any, exchange: str, routing_key: str, *arguments: Any) -> None:
        super()._do_restore_message(payload, exchange, routing_key, *arguments)
        for queue in self._lookup(exchange, routing_key):
            self._maybe_update_queues_expire(self._commands, queue)

    @cached_property  # type: ignore[untyped-decorator]
    def _refresh_binding(self) -> Callable[..., Any]:
        script = scripts.Script.from_text(kombu_redis.REFRESH_BINDING)

        def refresh(keys: list[str], args: list[Any], client: Any) -> Any:
            # At once, also where kombu has begun a transaction: inside of that no script has headroom.
            return self._commands.run(script, keys, args)

        return refresh

    def _delete(self, queue: str, *arguments: Any, **options: Any) -> None:
        super()._delete(queue, *arguments, **options)
        self._expires.pop(queue, None)

    def basic_publish(self, *arguments: Any, **options: Any) -> Any:
        # kombu closes the channel of a publish when the declaration before it has to be repeated (kombu 5.7).
        self._require_open()
        return super().basic_publish(*arguments, **options)

    def _require_open(self) -> None:
        """Raise ConnectionError, at which kombu takes a new channel.

        A closed one has no connection any more, and kombu 5.7 dies of looking for it.
        """
        if self.connection is None:
            raise ConnectionError("the channel is closed")

    def _inplace_augment_message(self, message: dict[str, Any], exchange: str, routing_key: str) -> None:
        before = message["properties"].get("delivery_tag")
        super()._inplace_augment_message(message, exchange, routing_key)
        message["properties"]["delivery_tag"] = before if isinstance(before, PublishTag) else PublishTag(uuid.uuid4())

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        """Enqueue a message, once, however often that is tried."""
        tasks = carries_tasks(message["properties"]["delivery_info"]["exchange"])
        if kwargs.get("_publish_batch") is not None or (queue in self._expires and not tasks):
            # A batch is never repeated, nor is a question.
            super()._put(queue, message, **kwargs)
            return
        key = self._q_for_pri(queue, self._get_message_priority(message))
        if not tasks:
            # Only the channel of whoever asks knows that its queue expires.
            with self._commands.pipeline() as pipe:
                pipe.lpush(key, dumps(message)).pexpire(key, ANSWER_MILLISECONDS).execute()
            return
        name = message_name(message)
        mark = f"{PUBLISHED}{name or f'{_ProducerId.value}-{threading.get_ident():x}'}:{key}"
        # That there is such a name says enough.
        arguments = [dumps(message), "1" if name else message["properties"]["delivery_tag"], PUBLISHED_SECONDS]
        # Also what a task publishes without Celery.
        with retry_commands(f"a message for {queue}"):
            run_with_retry(lambda: self._commands.run(scripts.PUBLISH, [key, mark], arguments), self._get_commands)
            run_with_retry(lambda: self._maybe_update_queues_expire(self._commands, queue), self._get_commands)

    def _get_commands(self) -> Any:
        return self._commands

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        """The queues that a message goes to.

        Raises InconsistencyError when it is a task's and there are none: kombu 5.7 would take it and put it nowhere.
        Events and answers that nobody waits for any more go there.
        """
        look = partial(super()._lookup, exchange, routing_key, default)
        queues: list[str] = run_with_retry(look, self._get_commands)
        if not queues and carries_tasks(exchange):
            raise InconsistencyError(f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}")
        return queues

    # The end.

    def close(self) -> None:
        if not self.closed and "deliveries" in self.__dict__ and self.deliveries.is_of_this_process:
            self._end_claims()
            self.deliveries.requeue_channel(self.number)
            self._backlog.clear()
        try:
            super().close()
        except (RedisError, OSError):
            # Queues that it would delete. kombu leaves everything open then, and it would stay for ever.
            self.auto_delete_queues.clear()
            super().close()

    def _end_claims(self) -> None:
        """Read the reply to a claim under way, so that its messages are requeued now and not after their lease."""
        claims, self._claim_connection = self._claim_connection, None
        if not claims:
            return
        with suppress(RedisError, OSError, Refused, AttributeError):
            connection = self.client.connection
            while claims.outstanding and connection.can_read(LAST_ANSWER_SECONDS):
                claims.read(connection)
        claims.reset()
        self._in_poll = None

    def _connparams(self, asynchronous: bool = False) -> Any:
        self._require_open()
        parameters = super()._connparams(asynchronous)
        if "ssl_min_version" in parameters:
            # kombu leaves it as it stands in the URL (kombu 5.7).
            parameters["ssl_min_version"] = int(parameters["ssl_min_version"])
        return parameters


def _payload(one: ClaimedMessage) -> dict[str, Any]:
    """The message as kombu wants it. Raises whatever there is when it is none."""
    # kombu would put replacements for what is not UTF-8, and nobody would know.
    payload = loads(one.message.decode())
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict):
        raise TypeError(f"not an object with properties but {type(payload).__name__}")
    headers, properties = payload.get("headers"), payload["properties"]
    for name, value in (("headers", headers), ("delivery_info", properties.get("delivery_info"))):
        if not isinstance(value, dict | None):
            raise TypeError(f"{name} is not an object but {type(value).__name__}")
    count, requeues = (_number(payload, name) for name in COUNTS)
    if headers is not None:
        headers["delivery_count"] = max(1, count) + requeues
        headers["requeue_count"] = requeues
    if count:
        # Somebody had started it, or had held it when he died.
        properties["delivery_info"] = (properties.get("delivery_info") or {}) | {"redelivered": True}
    if token := payload.get("rate_limit_token"):
        properties["delivery_info"] = (properties.get("delivery_info") or {}) | {"rate_limit_token": token}
    # The tag of this delivery; the one inside belongs to the publish.
    properties["delivery_tag"] = one.tag
    return payload


def _number(of: dict[str, Any], name: str) -> int:
    value = of.get(name)
    return value if isinstance(value, int) else 0


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """A channel to the Redis that sentinels name."""

    from_transport_options = Channel.from_transport_options + SENTINEL_OPTIONS
