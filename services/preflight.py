"""Is this Redis safe to be a broker? Asked before a worker or beat starts.

Refused: an unreadable login, a replica, a version without what kombu needs, eviction, and a broker that keeps
nothing on disk. Waited for: a Redis that does not answer yet.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import sleep
from typing import Any

from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    NoPermissionError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from config import Settings
from config.redis_url import RedisUrl
from services.connections import connect

REFUSED_EXIT_CODE = 3
# kombu 5.7 uses ZRANGE … BYSCORE, and BLMOVE is what waiting without polling needs: both came with 6.2.
LOWEST_VERSION = (6, 2)
# A Redis that starts answers within seconds; one that is away for longer need not be asked more often than this.
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 15.0


@dataclass
class Findings:
    """What is wrong with a Redis: `refusals` stop the start, `warnings` and `unchecked` are only said."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


class LoginRefused(Exception):
    """Redis does not accept the user name or password."""


def inspect_redis(client: Redis, allow_volatile: bool, variable: str) -> Findings:
    """Look at one Redis, the one that `variable` names.

    Raises LoginRefused, or redis' ConnectionError and TimeoutError while it does not answer.
    """
    found = Findings()
    _log_in(client, variable)
    info = _ask(client.info, found, "INFO")
    _check_version(info, found)
    _check_role(info, found)
    _check_eviction(_policy(client, info, found), found)
    _check_persistence(client, info, allow_volatile, found)
    _check_timeout(client, found)
    return found


def _log_in(client: Redis, variable: str) -> None:
    try:
        client.ping()
    except (AuthenticationError, AuthorizationError) as error:
        given = bool(client.get_connection_kwargs().get("password"))
        raise LoginRefused(_login_sentence(str(error), given, variable)) from None
    except NoPermissionError:
        return


def _login_sentence(error: str, given: bool, variable: str) -> str:
    if not given:
        return f"Redis wants a password and got none: set REDIS_PASSWORD, or put the password into {variable}"
    if "without any password configured" in error:
        return f"Redis has no password but was given one: empty REDIS_PASSWORD, or take it out of {variable}"
    return f"Redis knows no such user or the password is wrong: correct REDIS_PASSWORD, or the login in {variable}"


def _ask(command: Callable[..., Any], found: Findings, name: str, *arguments: str) -> dict[str, Any]:
    """A command's answer; {} where this login may not send it, which is noted."""
    try:
        answer = command(*arguments)
    except ResponseError as error:
        found.unchecked.append(f"{name}: {error}")
        return {}
    return dict(answer)


def _check_version(info: dict[str, Any], found: Findings) -> None:
    text = str(info.get("redis_version", ""))
    if not text:
        return
    parts = text.split(".")
    if tuple(int(part) for part in parts[:2]) < LOWEST_VERSION:
        wanted = ".".join(map(str, LOWEST_VERSION))
        found.refusals.append(f"it is version {text}, and {wanted} or newer is needed: upgrade it")


def _check_role(info: dict[str, Any], found: Findings) -> None:
    if info.get("role") == "slave":
        found.refusals.append("it is a replica and refuses writes: name the master, or use a sentinel:// URL")


def _policy(client: Redis, info: dict[str, Any], found: Findings) -> str:
    if policy := info.get("maxmemory_policy"):
        return str(policy)
    return str(
        _ask(client.config_get, found, "CONFIG GET maxmemory-policy", "maxmemory-policy").get("maxmemory-policy", "")
    )


def _check_eviction(policy: str, found: Findings) -> None:
    if policy and policy != "noeviction":
        found.refusals.append(
            f"its maxmemory-policy is {policy}, so it throws away waiting tasks when it is full, without an error: "
            "run 'redis-cli CONFIG SET maxmemory-policy noeviction', and set it in redis.conf"
        )


def _check_persistence(client: Redis, info: dict[str, Any], allow_volatile: bool, found: Findings) -> None:
    if str(info.get("aof_enabled", "")) == "1":
        return
    answer = _ask(client.config_get, found, "CONFIG GET save", "save")
    if "save" not in answer and info:
        # INFO knows nothing of RDB snapshots; that one was ever written is the only hint.
        saved = int(info.get("rdb_saves", 0) or 0) > 0
        found.warnings.append(
            "its append-only file is off, and whether it writes snapshots cannot be read"
            + ("" if saved else "; it has written none so far")
            + ": what was sent since the last one is lost when it dies"
        )
        return
    if answer.get("save"):
        found.warnings.append(
            "its append-only file is off: what was sent since its last snapshot is lost when it dies; run "
            "'redis-cli CONFIG SET appendonly yes', and set it in redis.conf"
        )
        return
    if not info:
        return
    sentence = "it keeps nothing on disk, so every waiting task is lost when it restarts"
    if allow_volatile:
        found.warnings.append(f"{sentence} (BROKER_ALLOW_VOLATILE=1)")
        return
    found.refusals.append(
        f"{sentence}: run 'redis-cli CONFIG SET appendonly yes' and set it in redis.conf, or set "
        "BROKER_ALLOW_VOLATILE=1 if losing tasks is meant"
    )


def _check_timeout(client: Redis, found: Findings) -> None:
    seconds = str(_ask(client.config_get, found, "CONFIG GET timeout", "timeout").get("timeout", "0"))
    if seconds != "0":
        found.warnings.append(
            f"it closes connections that are idle for {seconds} s (timeout {seconds}): idle workers lose theirs and "
            "reconnect again and again; run 'redis-cli CONFIG SET timeout 0', and set it in redis.conf"
        )


def say(line: str) -> None:
    """One line for the log, at once."""
    print(f"preflight: {line}", file=sys.stderr, flush=True)


def check(settings: Settings) -> None:
    """Check the broker's and the results' Redis; wait for them; exit with 3 where one is refused."""
    refused = not _check_one(settings, "CELERY_BROKER_URL", settings.broker_url, settings.broker.allow_volatile)
    if settings.result_url.server != settings.broker_url.server:
        # Results may be lost where tasks may not: their Redis only has to answer, and not to evict.
        refused |= not _check_one(settings, "CELERY_RESULT_BACKEND", settings.result_url, allow_volatile=True)
    if refused:
        sys.exit(REFUSED_EXIT_CODE)


def _check_one(settings: Settings, variable: str, url: RedisUrl, allow_volatile: bool) -> bool:
    client = connect(url, settings)
    name = f"{variable} ({url.masked()})"
    try:
        found = wait_for(lambda: inspect_redis(client, allow_volatile, variable), name)
    except LoginRefused as error:
        say(f"error: {name}: {error}")
        return False
    except RedisError as error:
        say(f"error: {name}: Redis refused a command it has to allow: {error}")
        return False
    finally:
        client.close()
    for refusal in found.refusals:
        say(f"error: {name}: {refusal}")
    for warning in found.warnings:
        say(f"warning: {name}: {warning}")
    if found.unchecked:
        say(f"warning: {name}: not everything could be checked; refused were {'; '.join(found.unchecked)}")
    return not found.refusals


def wait_for(look: Callable[[], Findings], name: str) -> Findings:
    """`look()`, again and again while Redis does not answer."""
    seconds = FIRST_WAIT_SECONDS
    while True:
        try:
            return look()
        except (ConnectionError, TimeoutError, OSError) as error:
            if isinstance(error, AuthenticationError):
                raise
            say(f"waiting for {name}: {error}; next try in {seconds:g} s")
        # Jitter: a hundred workers must not come back in the same millisecond.
        sleep(seconds * random.uniform(0.8, 1.2))
        seconds = min(seconds * 2, LONGEST_WAIT_SECONDS)
