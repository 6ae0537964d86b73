"""Redis servers for every form of URL, with passwords of awkward characters."""

from pathlib import Path

from tests.support.harness import Harness
from tests.support.ports import free_port
from tests.support.redis.server import RedisServer, make_certificates, require_tls

AWKWARD = "p@$$:/#%'\" é"
SENTINEL_PASSWORD = "s:3/cr#t é"
MASTER = "the-master"
TLS_FORMS = ("rediss", "sentinel with TLS")
FORMS = ("redis", "redis+socket", "sentinel", *TLS_FORMS)
# kombu alone does not read the version (kombu 5.7).
MORE = "&ssl_check_hostname=true&ssl_min_version=TLSv1.3"


def quote_for_redis(text: str) -> str:
    """A text as redis.conf takes any: each byte by its number."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def start_server(
    harness: Harness, form: str, database: int = 0, options: str = ""
) -> tuple[RedisServer, dict[str, str]]:
    """A server that is reached by this form of URL, and the settings that name it; results are in the next database.

    `options` are more of those that stand in URLs with TLS. Of two sentinels the second is down.
    """
    redis = harness.redis(AWKWARD, certificates=issue_certificates(harness) if form in TLS_FORMS else None)
    options = options if redis.certificates else ""
    databases = (database, database + 1)
    settings = {"REDIS_PASSWORD": AWKWARD}
    # The password in the broker's URL, and from REDIS_PASSWORD for the results'.
    urls = [redis.url(databases[0]), redis.url(databases[1], password="")]
    if form == "redis+socket":
        urls = [redis.socket_url(each) for each in databases]
    if form.startswith("sentinel"):
        port = start_sentinel(harness, redis, SENTINEL_PASSWORD).port
        authority = f"?ssl_ca_certs={redis.certificates / 'ca.crt'}" if redis.certificates else ""
        urls = [f"sentinel://127.0.0.1:{port}/{each}{authority}" for each in databases]
        # If the first were down, redis-py would try it for 3 s with each new connection (redis-py 8.1).
        options += f";sentinel://127.0.0.1:{free_port()}"
        settings |= {"CELERY_SENTINEL_MASTER": MASTER, "CELERY_SENTINEL_PASSWORD": SENTINEL_PASSWORD}
    return redis, settings | {"CELERY_BROKER_URL": urls[0] + options, "CELERY_RESULT_BACKEND": urls[1] + options}


def issue_certificates(harness: Harness, *names: str) -> Path:
    """Certificates for a server; skips the test where there is no TLS."""
    require_tls(harness.directory)
    return make_certificates(harness.path("certificates"), *names)


def start_sentinel(
    harness: Harness, master: RedisServer, password: str = "", *lines: str, name: str = MASTER
) -> RedisServer:
    """A sentinel for this master."""
    lines = (*lines, f"sentinel monitor {name} 127.0.0.1 {master.port} 1")
    if password:
        lines = (f"requirepass {quote_for_redis(password)}", *lines)
    if master.password:
        lines = (*lines, f"sentinel auth-pass {name} {quote_for_redis(master.password)}")
    return harness.redis(password, lines, sentinel=True, certificates=master.certificates)
