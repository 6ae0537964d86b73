"""Reserve: a worker goes on writing for a while when Redis is at maxmemory, because what it does there empties Redis.

Redis refuses a command then, and nothing of it has happened; the same is asked of a script, which Redis lets through
as long as its reserve lasts (services/broker/lua/headroom.lua). Where there is nothing left of it, or the Redis of
the results lets nobody run scripts, the refusal stands. Producers outside of workers, beat and Flower have no reserve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import redis
from redis.client import Pipeline
from redis.commands.core import Script
from redis.exceptions import OutOfMemoryError, ResponseError

from services.broker import scripts
from services.broker.client import format_error
from services.broker.retry import RetryState

T = TypeVar("T")

# What Redis 6 says of a script's command, and redis-py has no class for.
OUT_OF_MEMORY = " -OOM "


def is_full(error: Exception) -> bool:
    """Whether Redis has refused something for want of memory."""
    return isinstance(error, OutOfMemoryError) or OUT_OF_MEMORY in format_error(error)


def spare(attempt: Callable[[], T], again: Callable[[], T]) -> T:
    """`attempt`; in a worker `again`, which is the same from the reserve, when Redis has no memory for it."""
    try:
        return attempt()
    except ResponseError as error:
        if not RetryState.in_worker or not is_full(error):
            raise
        try:
            return again()
        except ResponseError:
            raise error from None


class Client(redis.Redis):
    """A client that has a part in the reserve."""

    @cached_property
    def plain(self) -> redis.Redis:
        """A client without it."""
        return redis.Redis(connection_pool=self.connection_pool)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        again = lambda: with_headroom(self, [(args, options)])[0]  # noqa: E731
        return spare(partial(super().execute_command, *args, **options), again)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return Transaction(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    def register_script(self, script: Any) -> Any:
        return KnownScript(self, script)

    def run(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script. Raises redis.exceptions.RedisError."""
        again = partial(script.with_headroom, self.plain, keys, arguments)
        return spare(partial(script, self.plain, keys, arguments), again)


class Transaction(Pipeline):
    """The same for a transaction; a pipeline that is none may have been carried out in part, and is left alone."""

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)
        attempt = partial(super().execute, raise_on_error)
        if not self.transaction:  # type: ignore[truthy-function]
            return attempt()
        return spare(attempt, partial(with_headroom, self, commands))


class KnownScript(Script):
    """A script that comes with its text when Redis does not know it.

    redis-py loads it and asks again, and between the two somebody may flush the scripts: Celery would take that for the
    end of a chord (redis-py 8.1).
    """

    def __init__(self, client: Client, script: str) -> None:
        super().__init__(client, script)
        self._known = scripts.of(script)

    def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        client = client or self.registered_client
        return client.run(self._known, keys or [], args or [])


def with_headroom(client: Any, commands: Sequence[tuple[Any, Any]]) -> list[Any]:
    """What redis-py answers to these commands and their options, carried out by a script in one step.

    What a worker writes is answered with texts, numbers, and lists of them; a map or a set would come as a list.
    """
    words = [word for arguments, _ in commands for word in (len(arguments), *arguments)]
    answers = scripts.COMMANDS.with_headroom(redis.Redis(connection_pool=client.connection_pool), [], words)
    told = []
    for answer, (arguments, options) in zip(answers, commands, strict=True):
        # Where redis-py's own cache would look.
        options.pop("keys", None)
        understand = client.response_callbacks.get(arguments[0])
        told.append(understand(answer, **options) if understand else answer)
    return told
