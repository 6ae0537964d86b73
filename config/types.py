"""Types of the settings: how a value is read from the text of its variable, and what is allowed, in words."""

import re
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from config import redis_url
from config.redis_url import RedisUrl

# Every request may carry these headers, also one of somebody who has not logged in: a proxy that named users in one
# of them would let everybody in.
HEADERS_OF_EVERY_REQUEST = {
    *("accept", "authorization", "connection", "cookie", "forwarded", "host", "origin", "referer", "user-agent", "via"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-real-ip", "x-scheme"),
}


class Allowed(str):
    """The values that a type takes, in words: part of an error and of the reference."""


def read_whole(text: str) -> str:
    """Refuse what int() takes beside digits: "1_000", "3600.0" and "+5" are more often mistakes than meant."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError("not a whole number")
    return text


def split(text: str, separator: str = ",") -> tuple[str, ...]:
    """The parts between separators, without spaces around them and without empty ones."""
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def read_dead_letters(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    return () if names == ("none",) else names


def read_autoscale(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]+),([0-9]+)", text.replace(" ", ""))
    if not match or not int(match[1]) >= int(match[2]) >= 1:
        raise ValueError("not a pair of sizes")
    return int(match[1]), int(match[2])


def read_login(text: str) -> str:
    user, _, password = text.partition(":")
    if not (user and password):
        raise ValueError("not user:password")
    return text


def read_header(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", text) or text.lower() in HEADERS_OF_EVERY_REQUEST:
        raise ValueError("not a header that names a user")
    return text


def read_networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    networks = tuple(ip_network(part) for part in split(text))
    version_4 = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
    version_6 = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
    prefixes = [network.prefixlen for network in version_4] + [network.prefixlen for network in version_6]
    # A network with a prefix of 0 is every address, and so are two halves of it once they are collapsed.
    if not prefixes or not all(prefixes):
        raise ValueError("not named addresses")
    return networks


def read_address(text: str) -> str:
    """Refuse an IPv6 address without brackets: in `ports` Compose cannot tell it from a port."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if (ip_address(bare).version == 6) is (bare == text):
        raise ValueError("IPv6 needs brackets, and IPv4 has none")
    return text


def read_time_zone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        raise ValueError("not a time zone") from None
    return text


def read_schedule(text: str) -> tuple[tuple[str, str], ...]:
    """Read `entry=off; entry=60; entry=0 3 * * *` into pairs."""
    pairs = []
    for part in split(text, ";"):
        entry, _, period = (word.strip() for word in part.partition("="))
        valid = period == "off" or re.fullmatch(r"[1-9][0-9]{0,8}", period) or len(period.split()) == 5
        if not (entry and valid):
            raise ValueError(f"{part!r} cannot be read")
        pairs.append((entry, period))
    return tuple(pairs)


def size_in_bytes(size: str) -> int:
    """Bytes of a size such as 512m."""
    return int(size[:-1]) << 10 * ("kmg".index(size[-1]) + 1)


Lower = BeforeValidator(str.lower)
Pool = Annotated[Literal["prefork", "threads", "solo"], Lower]
RateLimitScope = Annotated[Literal["node", "shared"], Lower]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], Lower]
# Unset until the first `make up`.
Runtime = Annotated[Literal["docker", "local", ""], Lower, Allowed("docker or local")]
Whole = Annotated[int, BeforeValidator(read_whole)]
ZeroOrOne = Annotated[Whole, Field(ge=0, le=1), Allowed("0 or 1")]
Port = Annotated[Whole, Field(ge=1, le=65535), Allowed("a port from 1 to 65535")]
Flag = Annotated[bool, Allowed("1 or 0")]
Size = Annotated[
    str, Lower, Field(pattern=r"^[1-9][0-9]*[kmg]$"), Allowed("a whole number with k, m or g, such as 512m")
]
# The kernel gives no container less than a hundredth of a CPU.
Cpus = Annotated[
    str,
    Field(pattern=r"^(0(\.0+)?|0\.(0[1-9]|[1-9])[0-9]*|[1-9][0-9]*(\.[0-9]+)?)$"),
    Allowed("a number from 0.01, such as 1 or 0.5, up to the CPUs of the machine; 0 is no limit"),
]
Url = Annotated[
    RedisUrl,
    BeforeValidator(redis_url.parse),
    Allowed("a redis://, rediss://, redis+socket:// or sentinel:// URL, its password percent-encoded"),
]
Secret = Annotated[SecretStr, Allowed("any text")]
Login = Annotated[SecretStr, BeforeValidator(read_login), Allowed("user:password")]
Modules = Annotated[tuple[str, ...], BeforeValidator(split), Allowed("module names separated by commas")]
Queues = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], ...],
    BeforeValidator(split),
    Field(min_length=1),
    Allowed("queue names of letters, digits, dots, dashes and underscores, separated by commas"),
]
DeadLetters = Annotated[
    tuple[Literal["retries", "rejects"], ...],
    BeforeValidator(read_dead_letters),
    Allowed("retries, rejects, both with a comma between, or none"),
]
Autoscale = Annotated[
    tuple[int, int] | None,
    BeforeValidator(read_autoscale),
    Allowed("largest,smallest: two whole numbers of 1 or more, such as 8,2"),
]
TimeZone = Annotated[str, BeforeValidator(read_time_zone), Allowed("a name of the tz database")]
Schedule = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(read_schedule),
    Allowed("entry=period pairs separated by ';', a period being whole seconds, five crontab fields, or off"),
]
Header = Annotated[
    str, BeforeValidator(read_header), Allowed("the name of a header that clients cannot send through the proxy")
]
Networks = Annotated[
    tuple[IPv4Network | IPv6Network, ...],
    BeforeValidator(read_networks),
    Allowed("IP addresses and networks, such as 10.0.0.7 or 10.0.1.0/24, separated by commas; not all addresses"),
]
Address = Annotated[str, BeforeValidator(read_address), Allowed("an IP address of the host, IPv6 in brackets")]
UrlPrefix = Annotated[
    str,
    Field(pattern=r"^/?[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*/?$"),
    AfterValidator(lambda path: path.strip("/")),
    Allowed("a path"),
]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/@:-]*$"), Allowed("an image name with a full version")]
Directory = Annotated[str, Field(pattern=r"^/.*[^/]$"), Allowed("an absolute path")]
Name = Annotated[str, Allowed("a name")]
