"""The client of the result backend: inside `retry_commands` it repeats a command until Redis takes it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from redis.client import Pipeline

from services.broker import headroom, scripts
from services.broker.retry import run_with_retry


class RetryingClient(headroom.Client):
    """A client that repeats its commands, and tries them with the headroom of a full Redis."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return run_with_retry(partial(super().execute_command, *args, **options), lambda: self)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return RetryingTransaction(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    def run(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        return run_with_retry(partial(self.run_once, script, keys, arguments), lambda: self)

    def run_once(self, script: scripts.Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script once. Raises redis.exceptions.RedisError."""
        return super().run(script, keys, arguments)


class RetryingTransaction(headroom.Transaction):
    """The same for a transaction: all of it or nothing."""

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)

        def attempt() -> list[Any]:
            # A pipeline forgets its commands when it fails.
            self.command_stack = list(commands)
            return super(RetryingTransaction, self).execute(raise_on_error)

        return run_with_retry(attempt, lambda: self)
