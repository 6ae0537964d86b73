"""redis-py clients for the Redis URLs that the broker and the result backend are given."""

import os
import re
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import redis
from redis._parsers.base import BaseParser
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from config import ConfigError, Settings
from config.celery import CONNECT_TIMEOUT_SECONDS, SOCKET_TIMEOUT_SECONDS, build_sentinel_options
from config.redis_url import TLS_FILES, RedisUrl

# A server repeats the arguments of a command that it does not know. redis-py logs in with HELLO, which came with Redis
# 6 and may be renamed: there the arguments are the password (redis-py 8.1).
ARGUMENTS = re.compile(r", with args beginning with:.*", re.DOTALL)
# In every client of the process: kombu, Celery and RedBeat make their own, whose errors end in logs and tracebacks, and
# redis-py has no hook for it.
_parser: Any = BaseParser
_parse_error = _parser.parse_error.__func__
_parser.parse_error = classmethod(lambda cls, response: _parse_error(cls, ARGUMENTS.sub("", response)))

# Redis is away: there is no connection. Any other error is a reply to one command, and says nothing about the next one.
UNREACHABLE = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)
# What Redis 7 appends to an error in a script.
SCRIPT = re.compile(r" script: [0-9a-f]{40}.*")


class LateConfigError(ConfigError, click.ClickException):
    """A mistake in the settings that shows after they were read; `celery` prints the sentence and no traceback."""

    exit_code = 2

    def __init__(self, problem: str) -> None:
        click.ClickException.__init__(self, problem)
        self.problems = (problem,)


class UrlNotSetError(LateConfigError):
    """A URL of Redis has to be set, and is not."""

    def __init__(self, variables: Iterable[str]) -> None:
        super().__init__(
            f"{' and '.join(variables)} must be exported, because nobody outside the stack's containers has a host "
            "named redis; and REDIS_PASSWORD, where the URL has no password: docs/connect.md says what to write"
        )


def require_set(url: str, settings: Settings) -> None:
    """Raise UrlNotSetError when this URL is a default with a host that exists only inside the stack's containers."""
    unset = settings.unset_urls
    if url in [default.text() for default in unset.values()]:
        raise UrlNotSetError(unset)


def require_tls_files(settings: Settings) -> None:
    """Raise ConfigError where a URL names a file of TLS that cannot be used: redis-py would take its Redis for away."""
    urls = {"CELERY_BROKER_URL": settings.broker_url, "CELERY_RESULT_BACKEND": settings.result_url}
    problems = [f"{variable}: {problem}" for variable, url in urls.items() if (problem := _find_tls_problem(url))]
    if problems:
        raise ConfigError(problems)


def _find_tls_problem(url: RedisUrl) -> str:
    """Say what is wrong with the files of TLS that a URL names; "" for nothing."""
    files, context = dict(url.tls), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in TLS_FILES:
        try:
            Path(files.get(name, os.devnull)).open("rb").close()
        except (OSError, ValueError) as error:
            return (
                f"{name} names {files[name]}, which cannot be read ({_format_reason(error)}): correct the path; in a "
                "container it is one inside, where the file has to be mounted (docs/connect.md)"
            )
    authority, certificate, key = (files.get(name) for name in TLS_FILES)
    try:
        if authority:
            context.load_verify_locations(authority)
    except OSError as error:
        reason = _format_reason(error)
        return f"ssl_ca_certs names {authority}, which has no certificate in PEM form ({reason}): correct it"
    try:
        if certificate:
            # Without a password openssl asks the terminal for one.
            context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        return (
            f"ssl_certfile and ssl_keyfile name {' and '.join(filter(None, [certificate, key]))}, which cannot be used "
            f"({_format_reason(error)}): name a certificate and its key, in PEM form, the key without a password"
        )
    return ""


def _format_reason(error: Exception) -> str:
    """The error of the system or of openssl, without the line in the latter's source."""
    return str(getattr(error, "strerror", None) or error).partition(" (_ssl.c")[0]


def connect(url: RedisUrl, settings: Settings, **options: Any) -> redis.Redis:
    """A client for `url`, which connects with its first command.

    `options` go to redis-py in place of the defaults. No command is retried: the caller knows whether that is safe.
    Commands raise redis.exceptions.RedisError. Raises UrlNotSetError.
    """
    require_set(url.text(), settings)
    keywords: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "username": url.username or None,
        "password": url.password or None,
        "db": url.database,
        "ssl": bool(url.tls),
        **url.tls_options,
    } | options
    if url.scheme == "sentinel":
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            url.hosts, sentinel_kwargs=build_sentinel_options(settings, url) | {"retry": keywords["retry"]}, **keywords
        )
        master: redis.Redis = sentinel.master_for(settings.broker.sentinel_master)
        return master
    if url.scheme == "redis+socket":
        return redis.Redis(unix_socket_path=url.socket_path, **keywords)
    host, port = url.hosts[0]
    return redis.Redis(host=host, port=port, **keywords)


def answers_ping(get_client: Callable[[], redis.Redis]) -> bool:
    """Whether Redis answers one PING over the connections of a client; it is not retried."""
    try:
        return bool(redis.Redis(connection_pool=get_client().connection_pool).ping())
    except (redis.RedisError, OSError):
        return False


def describe_server(client: redis.Redis) -> str:
    """Which Redis a client talks to, without its login, for a log line."""
    pool: Any = client.connection_pool
    options = pool.connection_kwargs
    host = options.get("path") or f"{options.get('host')}:{options.get('port')}"
    return f"Redis at {getattr(pool, 'service_name', None) or host}/{options.get('db') or 0}"


def format_error(error: Exception) -> str:
    """The error of Redis without the command that redis-py repeats in it, which may hold a task's result.

    Nor has it the SHA-1 of the script that the command was in.
    """
    text = SCRIPT.sub("", str(error).rpartition("caused error: ")[2])
    return " ".join(f"{getattr(error, 'status_code', None) or ''} {text}".split()) or repr(error)
