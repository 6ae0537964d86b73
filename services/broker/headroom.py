"""Headroom: a worker goes on writing for a while when Redis is at maxmemory, because what it does there empties Redis.

Redis refuses such a command, and has done nothing of it. The worker then has the same done by a script, which Redis
lets through as long as its headroom lasts (services/broker/lua/headroom.lua). Where none is left, or the Redis of the
results lets nobody run scripts, the refusal stands. Producers outside of workers, beat and Flower have no headroom.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import redis
from redis.client import Pipeline
from redis.exceptions import OutOfMemoryError, ResponseError

from services.broker import scripts
from services.broker.client import format_error
from services.broker.retry import RetryState

T = TypeVar("T")


def run_with_fallback(attempt: Callable[[], T], use_headroom: Callable[[], T]) -> T:
    """Run `attempt`; in a worker run `use_headroom`, which does the same, when Redis is out of memory."""
    try:
        return attempt()
    except ResponseError as error:
        # The text is what Redis 6 says of a script's command: redis-py has no class for that.
        is_full = isinstance(error, OutOfMemoryError) or " -OOM " in format_error(error)
        if not RetryState.in_worker or not is_full:
            raise
        try:
            return use_headroom()
        except ResponseError:
            raise error from None


class Client(redis.Redis):
    """A client whose commands, transactions and scripts use the headroom of a full Redis."""

    @cached_property
    def without_headroom(self) -> redis.Redis:
        """A client of the same connections that uses none."""
        return redis.Redis(connection_pool=self.connection_pool)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        attempt = partial(super().execute_command, *args, **options)
        return run_with_fallback(attempt, lambda: execute_with_headroom(self, [(args, options)])[0])

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return Transaction(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    def register_script(self, script: Any) -> Any:
        """A function that runs a script.

        redis-py's own loads a script that Redis does not know, and then calls it again. Where the scripts are flushed
        in between, Celery would take the error for the end of a chord (redis-py 8.1).
        """
        registered = scripts.Script.from_text(script)

        def run(keys: Any = None, args: Any = None, client: Any = None) -> Any:
            return (client or self).run(registered, keys or [], args or [])

        return run

    def run(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script. Raises redis.exceptions.RedisError."""
        client = self.without_headroom
        return run_with_fallback(
            partial(script, client, keys, arguments), partial(script.with_headroom, client, keys, arguments)
        )


class Transaction(Pipeline):
    """The same for a transaction; another pipeline may have been carried out in part, and is not repeated."""

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)
        attempt = partial(super().execute, raise_on_error)
        if not self.transaction:  # type: ignore[truthy-function]
            return attempt()
        return run_with_fallback(attempt, partial(execute_with_headroom, self, commands))


def execute_with_headroom(client: Any, commands: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Have a script carry out these commands, each with its options, in one step. Returns what redis-py makes of each.

    Commands of a worker are answered with texts, numbers, and lists of them; a map or a set would come as a list.
    """
    words = [word for arguments, _ in commands for word in (len(arguments), *arguments)]
    replies = scripts.COMMANDS.with_headroom(redis.Redis(connection_pool=client.connection_pool), [], words)
    parsed = []
    for reply, (arguments, options) in zip(replies, commands, strict=True):
        # For redis-py's own cache, which is not asked here.
        options.pop("keys", None)
        parse = client.response_callbacks.get(arguments[0])
        parsed.append(parse(reply, **options) if parse else reply)
    return parsed
