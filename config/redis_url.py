"""Redis URLs: one parser, because Celery, kombu, RedBeat and redis-py each read them differently."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ssl import TLSVersion
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
MASK = "***"
DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "sentinel": 26379}
TLS_VERSIONS = {"TLSv1.2": TLSVersion.TLSv1_2, "TLSv1.3": TLSVersion.TLSv1_3}
# What may be written, in lower case, and the value that it stands for.
TLS_CHOICES = {
    "ssl_cert_reqs": {written: name for name in ("required", "optional", "none") for written in (name, f"cert_{name}")},
    "ssl_check_hostname": {"true": "true", "false": "false"},
    # Also by number: the URL that Celery gets has it so, because redis-py reads nothing else there (redis-py 8.1).
    "ssl_min_version": {
        written: name for name, number in TLS_VERSIONS.items() for written in (name.lower(), str(int(number)))
    },
}
PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]*:)[^/@\s]+@")
# Whether a sentinel:// URL names a database: a login has no slash, and a question mark ends the path.
NAMES_DATABASE = re.compile(r"sentinel://[^/?]*/+[^/?]")
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True)
class RedisUrl:
    """Where one Redis database is, and how to log in to it."""

    scheme: str
    database: int = 0
    hosts: tuple[tuple[str, int], ...] = ()
    socket_path: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    # Options with their values; none: no TLS. With sentinel:// they are for the sentinels and for the master.
    tls: tuple[tuple[str, str], ...] = ()

    @property
    def tls_options(self) -> dict[str, Any]:
        """The TLS options as redis-py's connections take them."""
        options: dict[str, Any] = dict(self.tls)
        if checked := options.get("ssl_check_hostname"):
            options["ssl_check_hostname"] = checked == "true"
        if version := options.get("ssl_min_version"):
            options["ssl_min_version"] = TLS_VERSIONS[version]
        return options

    @property
    def server(self) -> tuple[object, ...]:
        """Equal for two URLs of the same server, whatever their database and login."""
        return (self.hosts, self.socket_path)

    def with_password(self, password: str) -> Self:
        """The same URL with `password`, unless it has a password of its own."""
        return self if self.password or not password else replace(self, password=password)

    def text(self) -> str:
        """The URL as kombu and Celery read it, password percent-encoded."""
        numbers = {name: str(int(number)) for name, number in TLS_VERSIONS.items()}
        tls = [(name, numbers[value] if name == "ssl_min_version" else value) for name, value in self.tls]
        return self._render(quote(self.password, safe=""), tls)

    def mask(self) -> str:
        """The URL for logs and errors, with a mask in place of its password."""
        return self._render(MASK if self.password else "", self.tls)

    def _render(self, password: str, tls: Sequence[tuple[str, str]]) -> str:
        login = f"{quote(self.username, safe='')}:{password}@" if self.username or password else ""
        if self.socket_path:
            return f"{self.scheme}://{login}{quote(self.socket_path)}?virtual_host={self.database}"
        query = "?" + urlencode(tls) if tls else ""
        # An IPv6 address needs brackets.
        hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts]
        return ";".join(f"{self.scheme}://{login}{host}/{self.database}{query}" for host in hosts)


def mask_passwords(value: Any) -> Any:
    """A copy of `value`, of any nesting, with masks for its values named `password` and for passwords in Redis URLs."""
    if isinstance(value, dict):
        return {key: MASK if key == "password" and inner else mask_passwords(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return PASSWORD_IN_URL.sub(rf"\1{MASK}@", value)
    return [mask_passwords(inner) for inner in value] if isinstance(value, list) else value


def parse(text: str) -> RedisUrl:
    """Read a Redis URL.

    Raises ValueError with a reason that repeats neither the password nor the whole URL.
    """
    scheme = text.partition("://")[0]
    if scheme not in SCHEMES or "://" not in text:
        raise ValueError(f"it must start with one of {', '.join(s + '://' for s in SCHEMES)}")
    # A semicolon separates only where a URL follows, because a password may have one.
    parts = re.split(r"\s*;\s*(?=[a-z+]+://)", text.rstrip("; "))
    urls = [_parse_one(part) for part in parts]
    first = urls[0]
    if scheme != "sentinel":
        if len(urls) > 1:
            raise ValueError("only sentinel:// URLs can be a list separated by ';'")
        return first
    if any(url.scheme != "sentinel" for url in urls):
        raise ValueError("every URL of a sentinel:// list must start with sentinel://")
    tls = {url.tls for url in urls if url.tls}
    logins = {(url.username, url.password) for url in urls if url.username or url.password}
    databases = {url.database for url, part in zip(urls, parts, strict=True) if NAMES_DATABASE.match(part)}
    # What one URL of the list says, for instance the last, holds for all of them.
    for what, given in (("ssl_ options", tls), ("user and password", logins), ("database", databases)):
        if len(given) > 1:
            raise ValueError(f"the URLs of a sentinel:// list must have the same {what}, or only one of them has any")
    username, password = next(iter(logins), ("", ""))
    return replace(
        first,
        hosts=tuple(host for url in urls for host in url.hosts),
        tls=next(iter(tls), ()),
        username=username,
        password=password,
        database=next(iter(databases), 0),
    )


def _parse_one(text: str) -> RedisUrl:
    scheme, _, rest = text.partition("://")
    # Split here, because urlsplit drops or refuses some characters of a password, depending on the Python version.
    login, _, location = rest.rpartition("@")
    try:
        # urlsplit looks for a host only in URLs of schemes that it knows, such as http.
        parts = urlsplit("http://" + location)
        port = parts.port
    except ValueError as error:
        # Its message repeats its input, which may be part of a password.
        reason = "the port must be a number" if "port" in str(error).lower() else "check its brackets"
        raise ValueError(f"its host or port cannot be read ({reason})") from None
    url = RedisUrl(scheme, **_parse_login(scheme, login))
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if scheme == "redis+socket":
        if parts.hostname or parts.path in ("", "/"):
            problem = "a socket URL has no host" if parts.hostname else "it names no socket"
            raise ValueError(f"{problem}: write redis+socket:///path/to/socket")
        database = query.pop("virtual_host", "0")
        url = replace(url, socket_path=unquote(parts.path))
    else:
        url = replace(url, tls=_take_tls_options(scheme, query))
        if parts.hostname:
            url = replace(url, hosts=((unquote(parts.hostname), DEFAULT_PORTS[scheme] if port is None else port),))
        database = parts.path.strip("/") or "0"
    if query:
        raise ValueError(f"its query has {', '.join(sorted(query))}, which no part of Stalk reads")
    if not (url.hosts or url.socket_path):
        raise ValueError("it names no host")
    if not database.isascii() or not database.isdigit():
        raise ValueError("its database must be a whole number, 0 or more")
    return replace(url, database=int(database))


def _parse_login(scheme: str, login: str) -> dict[str, Any]:
    if any(mark in login for mark in "/#?"):
        raise ValueError("before its @ is a character that must be percent-encoded (/ is %2F, # is %23, ? is %3F)")
    username, colon, password = login.partition(":")
    if username and not colon:
        raise ValueError(
            f"it has a user but no password: Redis tools read {scheme}://secret@host as a password, "
            f"Celery reads it as a user; write {scheme}://:secret@host (password only) or "
            f"{scheme}://user:secret@host"
        )
    return {"username": unquote(username), "password": unquote(password)}


def _take_tls_options(scheme: str, query: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Take the TLS options out of `query`; certificates are checked unless the URL says otherwise."""
    if scheme not in ("rediss", "sentinel"):
        return ()
    given = {name: query.pop(name) for name in (*TLS_CHOICES, *TLS_FILES) if name in query}
    if scheme == "sentinel" and not given:
        return ()
    tls = {name: _read_tls_option(name, value) for name, value in ({"ssl_cert_reqs": "required"} | given).items()}
    if tls["ssl_cert_reqs"] == "none" and tls.get("ssl_check_hostname") == "true":
        raise ValueError("ssl_check_hostname is true, but with ssl_cert_reqs=none the certificate is not checked")
    if "ssl_keyfile" in tls and "ssl_certfile" not in tls:
        raise ValueError("ssl_keyfile is the key of a certificate, and ssl_certfile names none")
    return tuple(tls.items())


def _read_tls_option(name: str, value: str) -> str:
    if choices := TLS_CHOICES.get(name):
        if value.lower() not in choices:
            *others, last = dict.fromkeys(choices.values())
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(others)} and {last}")
        return choices[value.lower()]
    if not value:
        raise ValueError(f"{name} names no file")
    return value
