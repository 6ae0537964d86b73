"""Pre-flight: check before a worker or beat starts whether its Redis is safe to be a broker.

Refused are a login that is not accepted, TLS that fails, Redis Cluster, a replica, a version that is too old for kombu,
a user or a server with which Stalk's scripts fail, eviction, and a broker that keeps nothing on disk. A Redis that does
not answer yet is waited for.
"""

import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import sleep
from typing import Any

from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.sentinel import MasterNotFoundError

from config import Settings
from config.celery import LOWEST_REDIS_VERSION
from config.redis_url import RedisUrl
from services.broker import scripts
from services.broker.client import UNREACHABLE, connect, format_error, require_tls_files
from services.broker.keys import DEAD_LETTERS, RESULT, UNACKED_KEYS
from services.broker.outages import Outage

REFUSED_EXIT_CODE = 3
# A Redis that starts answers within seconds; one that is away for longer need not be asked more often than this.
FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 15.0
CLUSTER = (
    "it is a Redis Cluster, and Stalk moves a task between keys of different slots in one step: name a Redis that runs "
    "with cluster-enabled no, or use a sentinel:// URL"
)
TOO_OLD = (
    "it does not know HELLO, with which clients log in: name a Redis or Valkey of version "
    f"{'.'.join(map(str, LOWEST_REDIS_VERSION))} or newer, in which HELLO is not renamed"
)


@dataclass
class Findings:
    """What is wrong with a Redis: `refusals` stop the start, `warnings` and `unchecked` are only logged."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


class Refusal(Exception):
    """No check is possible: the login is not accepted, TLS fails, or it is a cluster."""


def inspect_redis(client: Redis, allow_volatile: bool, variable: str, carries_tasks: bool = True) -> Findings:
    """Check one Redis, the one that `variable` names.

    Raises Refusal, or redis' ConnectionError and TimeoutError while it does not answer.
    """
    found = Findings()
    _log_in(client, variable)
    info = _ask(client.info, found, "INFO")
    # Names that a user for results may ask for, if no others.
    _refuse_cluster(client, info, UNACKED_KEYS if carries_tasks else (f"{RESULT}1", f"{RESULT}2"), found)
    _check_version(info, found)
    if info.get("role") == "slave":
        found.refusals.append("it is a replica and refuses writes: name the master, or use a sentinel:// URL")
    if carries_tasks and not found.refusals:
        _check_scripts(client, found)
    _check_eviction(info.get("maxmemory_policy") or _read_config(client, "maxmemory-policy", found), found)
    if str(info.get("aof_enabled", "")) != "1":
        _check_snapshots(client, info, allow_volatile, found)
    _check_timeout(_read_config(client, "timeout", found), found)
    return found


def _log_in(client: Redis, variable: str) -> None:
    try:
        client.ping()
    except (AuthenticationError, AuthorizationError) as error:
        given = bool(client.get_connection_kwargs().get("password"))
        raise Refusal(_explain_login_error(str(error), given, variable)) from None
    except NoPermissionError:
        return
    except ResponseError as error:
        # A cluster has one database, and refuses a URL that names another.
        if "cluster mode" in str(error):
            raise Refusal(CLUSTER) from None
        # It is not ready: its disk is full, or a script runs.
        if str(error).startswith(("MISCONF", "BUSY")):
            raise ConnectionError(str(error)) from None
        if re.match("unknown command .HELLO", str(error)):
            raise Refusal(TOO_OLD) from None
        raise
    except MasterNotFoundError:
        raise ConnectionError(_ask_sentinels(client, variable)) from None
    except ConnectionError as error:
        _refuse_tls(error, variable)
        raise


def _ask_sentinels(client: Redis, variable: str) -> str:
    """Say why no sentinel names the master: redis-py says only of which kind the errors are (redis-py 8.1)."""
    pool: Any = client.connection_pool
    reasons = []
    for sentinel in pool.sentinel_manager.sentinels:
        options = sentinel.get_connection_kwargs()
        name = f"{options['host']}:{options['port']}"
        try:
            sentinel.ping()
        except AuthenticationError:
            raise Refusal(
                f"the sentinel {name} does not accept its password: correct CELERY_SENTINEL_PASSWORD"
            ) from None
        except RedisError as error:
            _refuse_tls(error, variable, f"the sentinel {name}: ")
            reasons.append(f"{name}: {error}")
        else:
            reasons.append(f"{name} knows none that is up")
    return f"no sentinel names a master {pool.service_name} ({'; '.join(reasons)})"


def _refuse_tls(error: RedisError, variable: str, whose: str = "") -> None:
    """Raise Refusal for an error of TLS, which does not pass by waiting."""
    failed = re.search(r"\[SSL: (\w+)\] ?([^(]*)", str(error))
    # A server that ends in the middle of a handshake is away.
    if not failed or "EOF" in failed[1]:
        return
    reason = failed[2].strip() or failed[1]
    if failed[1] == "CERTIFICATE_VERIFY_FAILED":
        raise Refusal(
            f"{whose}its certificate is not accepted ({reason}): name its authority in ssl_ca_certs of {variable}, "
            "and the server as its certificate does"
        )
    raise Refusal(
        f"{whose}it speaks no TLS, or not as asked to ({reason}): correct port and ssl_ options in {variable}"
    )


def _explain_login_error(error: str, given: bool, variable: str) -> str:
    if not given:
        return f"Redis wants a password and got none: set REDIS_PASSWORD, or put the password into {variable}"
    if "without any password configured" in error:
        return f"Redis has no password but was given one: empty REDIS_PASSWORD, or take it out of {variable}"
    return f"Redis knows no such user or the password is wrong: correct REDIS_PASSWORD, or the login in {variable}"


def _ask(command: Callable[..., Any], found: Findings, name: str, *arguments: str) -> dict[str, Any]:
    """The reply to a command; {} where this login may not send it, which is noted."""
    try:
        return dict(command(*arguments))
    except ResponseError as error:
        found.unchecked.append(f"{name}: {error}")
        return {}


def _read_config(client: Redis, name: str, found: Findings) -> str | None:
    """The value of a directive of redis.conf; None where this login may not read it, which is noted."""
    value = _ask(client.config_get, found, f"CONFIG GET {name}", name).get(name)
    return None if value is None else str(value)


def _refuse_cluster(client: Redis, info: dict[str, Any], keys: Sequence[str], found: Findings) -> None:
    if info.get("redis_mode") == "cluster":
        raise Refusal(CLUSTER)
    try:
        # Keys of different slots, because INFO may be refused, and a proxy in front of a cluster may say anything.
        client.exists(*keys)
    except ResponseError as error:
        if _is_of_cluster(error):
            raise Refusal(CLUSTER) from None
        found.unchecked.append(f"EXISTS: {error}")


def _is_of_cluster(error: ResponseError) -> bool:
    is_clusters = isinstance(error, ClusterCrossSlotError | ClusterDownError | MovedError)
    # The error of a replica that has lost its master is a class of these (redis-py 8.1).
    return is_clusters and not isinstance(error, MasterDownError)


def _check_scripts(client: Redis, found: Findings) -> None:
    try:
        scripts.TOUCH_UNDECLARED(client, UNACKED_KEYS, [DEAD_LETTERS])
    except ResponseError as error:
        if _is_of_cluster(error):
            raise Refusal(CLUSTER) from None
        reason = format_error(error)
        is_of_acl = isinstance(error, NoPermissionError) or bool(re.search("ACL failure|user executing", reason))
        if is_of_acl and re.search(r"\bkeys?\b", reason):
            # Beat, for which this is checked as well, needs fewer keys than a worker.
            found.unchecked.append(f"EVAL: {reason}")
        elif is_of_acl or "unknown command" in reason:
            found.refusals.append(
                f"its user may not do what Stalk's scripts do ({reason}): allow it EVAL, EVALSHA and SCRIPT LOAD"
            )
        else:
            found.refusals.append(
                f"its scripts may touch only keys that they were told of ({reason}), as with Dragonfly and Redis "
                "Cluster, and Stalk's find some inside: name a Redis or Valkey that runs with cluster-enabled no"
            )


def _check_version(info: dict[str, Any], found: Findings) -> None:
    text = str(info.get("redis_version", ""))
    if text and tuple(int(part) for part in text.split(".")[:2]) < LOWEST_REDIS_VERSION:
        wanted = ".".join(map(str, LOWEST_REDIS_VERSION))
        found.refusals.append(f"it is version {text}, and {wanted} or newer is needed: upgrade it")


def _check_eviction(policy: str | None, found: Findings) -> None:
    if policy and policy != "noeviction":
        found.refusals.append(
            f"its maxmemory-policy is {policy}, so it throws away waiting tasks when it is full, without an error: "
            "run 'redis-cli CONFIG SET maxmemory-policy noeviction', and set it in redis.conf"
        )


def _check_snapshots(client: Redis, info: dict[str, Any], allow_volatile: bool, found: Findings) -> None:
    """Check what a Redis without an append-only file keeps on disk."""
    save = _read_config(client, "save", found)
    if save is None and info:
        # INFO knows nothing of RDB snapshots; that one was ever written is the only hint.
        saved = int(info.get("rdb_saves", 0) or 0) > 0
        found.warnings.append(
            "its append-only file is off, and whether it writes snapshots cannot be read"
            + ("" if saved else "; it has written none so far")
            + ": what was sent since the last one is lost when it dies"
        )
    elif save:
        found.warnings.append(
            "its append-only file is off: what was sent since its last snapshot is lost when it dies; run "
            "'redis-cli CONFIG SET appendonly yes', and set it in redis.conf"
        )
    elif info:
        sentence = "it keeps nothing on disk, so every waiting task is lost when it restarts"
        if allow_volatile:
            found.warnings.append(f"{sentence} (BROKER_ALLOW_VOLATILE=1)")
        else:
            found.refusals.append(
                f"{sentence}: run 'redis-cli CONFIG SET appendonly yes' and set it in redis.conf, or set "
                "BROKER_ALLOW_VOLATILE=1 if losing tasks is meant"
            )


def _check_timeout(seconds: str | None, found: Findings) -> None:
    if seconds not in (None, "0"):
        found.warnings.append(
            f"it closes connections that are idle for {seconds} s (timeout {seconds}): idle workers lose theirs and "
            "reconnect again and again; run 'redis-cli CONFIG SET timeout 0', and set it in redis.conf"
        )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(settings: Settings) -> None:
    """Check the broker's and the results' Redis; wait for them; exit with 3 where one is refused.

    Raises ConfigError for files of TLS that cannot be used.
    """
    require_tls_files(settings)
    broker, results = settings.broker_url, settings.result_url
    accepted = _check_one(settings, "CELERY_BROKER_URL", broker, settings.broker.allow_volatile)
    if (results.server, results.tls) != (broker.server, broker.tls):
        # Results may be lost where tasks may not: their Redis only has to answer, and not to evict.
        accepted &= _check_one(settings, "CELERY_RESULT_BACKEND", results, True, carries_tasks=False)
    if not accepted:
        sys.exit(REFUSED_EXIT_CODE)


def _check_one(
    settings: Settings, variable: str, url: RedisUrl, allow_volatile: bool, carries_tasks: bool = True
) -> bool:
    """Check one Redis and log what is found. Returns whether it is accepted."""
    name = f"{variable} ({url.mask()})"
    try:
        with connect(url, settings) as client:
            found = _wait_for(lambda: inspect_redis(client, allow_volatile, variable, carries_tasks), name)
    except Refusal as error:
        found = Findings([str(error)])
    except RedisError as error:
        found = Findings([f"Redis refused a command it has to allow: {error}"])
    if found.unchecked:
        commands = "; ".join(found.unchecked)
        found.warnings.append(f"not everything could be checked; refused were {commands}")
    for problem in found.refusals:
        _print(f"preflight: error: {name}: {problem}")
    for warning in found.warnings:
        _print(f"preflight: warning: {name}: {warning}")
    return not found.refusals


def _wait_for(inspect: Callable[[], Findings], name: str) -> Findings:
    """Run `inspect`, again and again while Redis does not answer."""
    seconds, outage = FIRST_WAIT_SECONDS, Outage("preflight", _print)
    while True:
        try:
            found = inspect()
            outage.record_recovery()
            return found
        except UNREACHABLE as error:
            if isinstance(error, AuthenticationError):
                raise
            outage.record_failure(error, name)
        # Jitter, so that a hundred workers do not come back in the same millisecond.
        sleep(seconds * random.uniform(0.8, 1.2))
        seconds = min(seconds * 2, LONGEST_WAIT_SECONDS)
