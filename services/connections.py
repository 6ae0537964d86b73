"""redis-py clients for the Redis URLs that the broker and the result backend are given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from config import ConfigError, Settings
from config.celery import CONNECT_TIMEOUT_SECONDS, SOCKET_TIMEOUT_SECONDS, sentinel_options
from config.redis_url import RedisUrl

# What Redis 7 says at the end of an error in a script.
SCRIPT = re.compile(r" script: [0-9a-f]{40}.*")


class NotSet(ConfigError, click.ClickException):
    """A URL that has to be set is not; Celery's command line shows the sentence and no traceback."""

    exit_code = 2

    def __init__(self, variables: Iterable[str]) -> None:
        problem = (
            f"{' and '.join(variables)} must be exported, because nobody outside the stack's containers has a host "
            "named redis; and REDIS_PASSWORD, where the URL has no password: docs/connect.md says what to write"
        )
        click.ClickException.__init__(self, problem)
        self.problems = (problem,)


def require_set(url: str, settings: Settings) -> None:
    """Raise NotSet when this URL is a default that leads nowhere."""
    unset = settings.unset_urls
    if url in [default.text() for default in unset.values()]:
        raise NotSet(unset)


def connect(url: RedisUrl, settings: Settings, **options: Any) -> redis.Redis:
    """A client for `url`; it connects with its first command.

    `options` go to redis-py and beat the defaults. No command is repeated by itself: callers know better
    whether that is safe. Commands raise redis.exceptions.RedisError.

    Raises NotSet.
    """
    require_set(url.text(), settings)
    keywords: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "username": url.username or None,
        "password": url.password or None,
        "db": url.database,
        "ssl": url.uses_tls,
        **url.tls_options,
    } | options
    if url.scheme == "sentinel":
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            url.hosts, sentinel_kwargs=sentinel_options(settings, url) | {"retry": keywords["retry"]}, **keywords
        )
        master: redis.Redis = sentinel.master_for(settings.broker.sentinel_master)
        return master
    if url.scheme == "redis+socket":
        return redis.Redis(unix_socket_path=url.socket_path, **keywords)
    host, port = url.hosts[0]
    return redis.Redis(host=host, port=port, **keywords)


def place(client: redis.Redis) -> str:
    """Which Redis a client talks to, for a log: without a login."""
    pool: Any = client.connection_pool
    options = pool.connection_kwargs
    host = options.get("path") or f"{options.get('host')}:{options.get('port')}"
    return f"Redis at {getattr(pool, 'service_name', None) or host}/{options.get('db') or 0}"


def refusal(error: Exception) -> str:
    """What Redis said, without the command that redis-py repeats before it: nobody wants a result in a log.

    Nor the number of the script that a command was in.
    """
    text = SCRIPT.sub("", str(error).rpartition("caused error: ")[2])
    return " ".join(f"{getattr(error, 'status_code', None) or ''} {text}".split()) or repr(error)
