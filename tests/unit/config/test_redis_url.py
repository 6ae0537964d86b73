"""config.redis_url"""

import re
import ssl
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import kombu
import pytest
import redis
from celery import Celery
from celery.app.backends import by_url
from hypothesis import given
from hypothesis import strategies as st

from config.redis_url import MASK, RedisUrl, mask_passwords, parse
from services.results.backend import BACKENDS

CHECKS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
# Whatever can be written down as UTF-8, control characters included.
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
HOST = st.sampled_from(["redis", "redis.example.com", "10.0.0.7", "::1"])
DATABASE = st.integers(0, 10**6)
PORT = st.integers(1, 65535)
# Distinct enough not to turn up by chance in what must not contain it.
PASSWORD = "s3cret-Zq7"


@st.composite
def urls(draw: st.DrawFn) -> RedisUrl:
    """Any URL that a configuration may name."""
    scheme = draw(st.sampled_from(["redis", "rediss", "redis+socket", "sentinel"]))
    common: dict[str, Any] = {
        "scheme": scheme,
        "database": draw(DATABASE),
        "username": draw(ANY_TEXT),
        "password": draw(ANY_TEXT),
    }
    if scheme == "redis+socket":
        return RedisUrl(**common, socket_path="/" + draw(ANY_TEXT.filter(bool)).lstrip("/") + "x")
    hosts = draw(st.lists(st.tuples(HOST, PORT), min_size=1, max_size=3 if scheme == "sentinel" else 1))
    tls = {"ssl_cert_reqs": draw(st.sampled_from(["required", "optional", "none"]))}
    if draw(st.booleans()):
        tls["ssl_check_hostname"] = (
            "false" if tls["ssl_cert_reqs"] == "none" else draw(st.sampled_from(["true", "false"]))
        )
    if draw(st.booleans()):
        tls["ssl_min_version"] = draw(st.sampled_from(["TLSv1.2", "TLSv1.3"]))
    for name in draw(st.sampled_from([[], ["ssl_ca_certs"], ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"]])):
        tls[name] = "/" + draw(ANY_TEXT)
    speaks_tls = scheme == "rediss" or (scheme == "sentinel" and draw(st.booleans()))
    return RedisUrl(**common, hosts=tuple(hosts), tls=tuple(tls.items()) if speaks_tls else ())


@given(urls())
def test_a_url_that_is_written_and_read_again_is_the_same(url: RedisUrl) -> None:
    assert parse(url.text()) == url


@given(urls())
def test_kombu_reads_the_same_login_server_and_database(url: RedisUrl) -> None:
    connection = kombu.Connection(url.text())
    if url.socket_path:
        # kombu passes a socket URL on whole, for the transport to read.
        assert f"redis+{connection.hostname}" == url.text()
        return
    assert (connection.userid or "", connection.password or "") == (url.username, url.password)
    assert (connection.hostname, connection.port) == url.hosts[0]
    assert int(connection.virtual_host) == url.database
    assert bool(connection.ssl) is bool(url.tls)
    if url.tls:
        # The number stays a word (kombu 5.7); a channel of ours makes it one.
        read = {name: int(value) if name == "ssl_min_version" else value for name, value in connection.ssl.items()}
        assert read == url.tls_options | {"ssl_cert_reqs": CHECKS[url.tls_options["ssl_cert_reqs"]]}


@given(urls())
def test_the_result_backend_reads_the_same_login_and_database(url: RedisUrl) -> None:
    app = Celery(set_as_current=False)
    app.loader.override_backends = BACKENDS
    # As config/celery.py has it.
    app.conf.redis_backend_use_ssl = url.tls_options if url.scheme == "sentinel" else None
    backend, text = by_url(url.text(), app.loader)
    parameters = backend(app=app, url=text).connparams
    assert (parameters.get("username") or "", parameters.get("password") or "") == (url.username, url.password)
    assert parameters["db"] == url.database
    if url.scheme == "sentinel":
        assert tuple((host["host"], host["port"]) for host in parameters["hosts"]) == url.hosts
    elif url.socket_path:
        assert parameters["path"] == url.socket_path
    else:
        assert (parameters["host"], parameters["port"]) == url.hosts[0]
    tls = {name: value for name, value in parameters.items() if name.startswith("ssl_")}
    expected = url.tls_options
    if expected:
        assert issubclass(parameters["connection_class"], redis.SSLConnection)
        expected["ssl_cert_reqs"] = CHECKS[expected["ssl_cert_reqs"]]
    assert tls == expected


@given(user=ANY_TEXT, around=st.tuples(ANY_TEXT, ANY_TEXT))
def test_no_form_for_people_shows_the_password(user: str, around: tuple[str, str]) -> None:
    password = PASSWORD.join(around)
    url = RedisUrl("redis", hosts=(("redis", 6379),), username=user, password=password)
    for text in (url.mask(), repr(url), str(url), f"{url}", mask_passwords(url.text())):
        assert PASSWORD not in text
        assert quote(password, safe="") not in text
    assert f":{MASK}@" in url.mask()


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (
            "redis+socket://:s3%40ret@/run/redis.sock?virtual_host=0",
            "redis+socket://:***@/run/redis.sock?virtual_host=0",
        ),
        ("sentinel://u:s3cret@a:1/0;sentinel://u:s3cret@b:1/0", "sentinel://u:***@a:1/0;sentinel://u:***@b:1/0"),
        ("see redis://:s3cret@a/0, then http://b:80/c@d", "see redis://:***@a/0, then http://b:80/c@d"),
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ({"password": "s3cret", "socket_timeout": 1}, {"password": "***", "socket_timeout": 1}),
        ([{"password": None}, "password"], [{"password": None}, "password"]),
    ],
)
def test_passwords_are_masked_in_what_a_connection_tells(found: object, shown: object) -> None:
    assert mask_passwords({"broker": {"transport_options": found}}) == {"broker": {"transport_options": shown}}


@pytest.mark.parametrize(
    "password", ["a;b", "a[b", "a]b", "a:b", "a@b", "a b", "a%b", "a'b", 'a"b', "a$b", "a&b", "a+b", "pä℀ss"]
)
@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel"])
def test_a_password_needs_percent_encoding_only_where_it_could_be_misread(scheme: str, password: str) -> None:
    url = parse(f"{scheme}://user:{password}@redis:7000/2")
    assert (url.username, url.password) == ("user", password)
    assert (url.hosts, url.database) == ((("redis", 7000),), 2)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("redis://redis/0", PASSWORD), ("redis://user:@redis/0", PASSWORD), ("redis://:own@redis/0", "own")],
)
def test_a_password_is_added_only_to_a_url_without_one(text: str, kept: str) -> None:
    assert parse(text).with_password(PASSWORD) == replace(parse(text), password=kept)
    assert parse(text).with_password("") == parse(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("redis://redis", RedisUrl("redis", 0, (("redis", 6379),))),
        ("redis://redis/", RedisUrl("redis", 0, (("redis", 6379),))),
        ("redis://redis:7000/5", RedisUrl("redis", 5, (("redis", 7000),))),
        ("redis://[::1]:7000/1", RedisUrl("redis", 1, (("::1", 7000),))),
        # Not the default: a port that is written down is the port that is meant.
        ("redis://redis:0", RedisUrl("redis", 0, (("redis", 0),))),
        # Percent-encoding is undone once.
        ("redis://:%2525@redis", RedisUrl("redis", 0, (("redis", 6379),), password="%25")),
        ("rediss://redis", RedisUrl("rediss", 0, (("redis", 6379),), tls=(("ssl_cert_reqs", "required"),))),
        (
            "rediss://h:1?ssl_cert_reqs=CERT_REQUIRED",
            RedisUrl("rediss", 0, (("h", 1),), tls=(("ssl_cert_reqs", "required"),)),
        ),
        (
            "rediss://h:1?ssl_cert_reqs=optional",
            RedisUrl("rediss", 0, (("h", 1),), tls=(("ssl_cert_reqs", "optional"),)),
        ),
        ("rediss://h:1?ssl_cert_reqs=CERT_NONE", RedisUrl("rediss", 0, (("h", 1),), tls=(("ssl_cert_reqs", "none"),))),
        ("redis+socket:///run/redis.sock", RedisUrl("redis+socket", 0, (), "/run/redis.sock")),
        ("redis+socket:///run/redis.sock?virtual_host=4", RedisUrl("redis+socket", 4, (), "/run/redis.sock")),
        ("redis+socket://user:a;b@/run/a%40b.sock", RedisUrl("redis+socket", 0, (), "/run/a@b.sock", "user", "a;b")),
        ("sentinel://s1", RedisUrl("sentinel", 0, (("s1", 26379),))),
        ("sentinel://s1:1/3;sentinel://s2:2/3", RedisUrl("sentinel", 3, (("s1", 1), ("s2", 2)))),
        ("sentinel://s1:1/3 ; sentinel://s2;", RedisUrl("sentinel", 3, (("s1", 1), ("s2", 26379)))),
    ],
)
def test_a_url_has_the_defaults_of_redis(text: str, url: RedisUrl) -> None:
    assert parse(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "sentinel://user:a;b@a:1/5?ssl_ca_certs=/ca;sentinel://user:a;b@b:2/5?ssl_ca_certs=/ca",
        "sentinel://user:a;b@a:1/5?ssl_ca_certs=/ca;sentinel://b:2",
        "sentinel://a:1;sentinel://user:a;b@b:2/5?ssl_ca_certs=/ca",
        "sentinel://user:a;b@a:1/;sentinel://b:2/5?ssl_ca_certs=/ca",
        "sentinel://user:a;b@a:1?ssl_ca_certs=/ca;sentinel://user:a;b@b:2/5",
    ],
)
def test_login_database_and_tls_are_for_all_sentinels_of_a_list(text: str) -> None:
    url, tls = parse(text), (("ssl_cert_reqs", "required"), ("ssl_ca_certs", "/ca"))
    assert url == RedisUrl("sentinel", 5, (("a", 1), ("b", 2)), "", "user", "a;b", tls)
    assert url.text().count("ssl_ca_certs") == url.text().count("user:a%3Bb@") == url.text().count("/5?") == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *(
            (
                f"{scheme}://{PASSWORD}@redis:6379/0",
                "it has a user but no password: .*; write "
                + re.escape(f"{scheme}://:secret@host (password only) or {scheme}://user:secret@host"),
            )
            for scheme in ("redis", "rediss", "sentinel", "redis+socket")
        ),
        ("", r"must start with one of redis://, rediss://, redis\+socket://, sentinel://"),
        (PASSWORD, "must start with one of"),
        (f"{PASSWORD}://redis", "must start with one of"),
        ("amqp://guest@rabbit", "must start with one of"),
        ("redis:/redis", "must start with one of"),
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        (f"redis://:{PASSWORD}@", "names no host"),
        (f"redis://:{PASSWORD}@/0", "names no host"),
        (f"redis://:{PASSWORD}/x@redis:6379/0", "percent-encoded .*/ is %2F"),
        (f"redis://:{PASSWORD}#x@redis:6379/0", "percent-encoded .*# is %23"),
        (f"redis://:{PASSWORD}?x@redis:6379/0", "percent-encoded .*[?] is %3F"),
        (f"redis://:{PASSWORD}@redis/zero", "its database must be a whole number"),
        (f"redis://redis/{PASSWORD}", "its database must be a whole number"),
        ("redis://redis/-1", "its database must be a whole number"),
        ("redis://redis/0/1", "its database must be a whole number"),
        ("redis://redis/²", "its database must be a whole number"),
        ("redis+socket:///s?virtual_host=x", "its database must be a whole number"),
        (f"redis://:{PASSWORD}@redis:port/0", "the port must be a number"),
        (f"redis://redis:{PASSWORD}/0", "the port must be a number"),
        ("redis://redis:70000/0", "the port must be a number"),
        (f"redis://:{PASSWORD}@[redis/0", "check its brackets"),
        (f"redis+socket://:{PASSWORD}@host/run/redis.sock", r"write redis\+socket:///path/to/socket"),
        ("redis+socket://", "names no socket"),
        ("redis+socket:///", "names no socket"),
        ("redis://a/0;redis://b/0", "only sentinel:// URLs can be a list"),
        (f"sentinel://a/0;redis://:{PASSWORD}@b/0", "must start with sentinel://"),
        (f"redis://:{PASSWORD}@redis/0?timeout=5&db=3", "its query has db, timeout, which no part of Stalk reads"),
        (f"redis://redis/0?password={PASSWORD}", "its query has password"),
        ("redis://redis/0?ssl_cert_reqs=none", "its query has ssl_cert_reqs"),
        (f"rediss://:{PASSWORD}@redis/0?ssl_cert_reqs=never", "'never'; allowed are required, optional and none"),
        ("sentinel://s1/0?ssl_cert_reqs=never", "'never'; allowed are required, optional and none"),
        ("rediss://redis/0?ssl_check_hostname=yes", "ssl_check_hostname is 'yes'; allowed are true and false"),
        ("rediss://redis/0?ssl_cert_reqs=none&ssl_check_hostname=true", "the certificate is not checked"),
        ("rediss://redis/0?ssl_min_version=TLSv1.1", "is 'TLSv1.1'; allowed are TLSv1.2 and TLSv1.3"),
        ("rediss://redis/0?ssl_ca_certs=", "ssl_ca_certs names no file"),
        ("sentinel://s1/0?ssl_keyfile=/k", "ssl_certfile names none"),
        ("rediss://redis/0?ssl_ciphers=x", "its query has ssl_ciphers, which no part of Stalk reads"),
        ("sentinel://s1/0?master_name=x", "its query has master_name, which no part of Stalk reads"),
        ("redis+socket:///s?ssl_cert_reqs=none", "its query has ssl_cert_reqs"),
        ("sentinel://a/0?ssl_cert_reqs=none;sentinel://b/0?ssl_ca_certs=/c", "must have the same ssl_ options"),
        (f"sentinel://:{PASSWORD}@a/0;sentinel://:{PASSWORD}2@b/0", "must have the same user and password"),
        ("sentinel://u:x@a/0;sentinel://v:x@b/0", "must have the same user and password"),
        ("sentinel://a/0;sentinel://b/5", "must have the same database"),
        ("sentinel://a/5;sentinel://b/0?ssl_ca_certs=/c", "must have the same database"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_a_reason_that_repeats_no_password(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        parse(text)
    assert PASSWORD not in str(refusal.value)


@pytest.mark.parametrize("written", ["TLSv1.3", "tlsv1.3", "772"])
def test_a_version_of_tls_is_shown_by_its_name(written: str) -> None:
    url = parse(f"rediss://redis/0?ssl_min_version={written}")
    assert url.tls_options["ssl_min_version"] is ssl.TLSVersion.TLSv1_3
    assert "ssl_min_version=TLSv1.3" in url.mask()


def test_the_server_of_two_databases_is_the_same() -> None:
    one, other = parse("redis://a:x@Redis:6379/0"), parse("redis://redis/1")
    assert one.server == other.server
    assert one.server != parse("redis://redis:7000/0").server
    assert parse("redis+socket:///a").server != parse("redis+socket:///b").server
