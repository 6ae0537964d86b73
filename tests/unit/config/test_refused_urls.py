"""URLs that an application outside the stack lacks, and TLS files that cannot be used: refused before anything starts.

Without that, Celery would look for the stack's own Redis, and redis-py would report for ever a Redis that is away.
"""

import subprocess
from pathlib import Path

import pytest

from config import ConfigError, load
from services.broker.client import UrlNotSetError, connect, require_tls_files
from tests.support.application import create_app
from tests.support.checkout import Checkout
from tests.support.redis.server import make_certificates
from tests.unit.refusals import run_refused

BROKER, RESULTS = "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"
URL = "redis://127.0.0.1:1/1"
UNSET = f"{BROKER} and {RESULTS} must be exported, because nobody outside the stack's containers"
GONE = {BROKER: "rediss://127.0.0.1:1/0?ssl_ca_certs=/etc/stalk/gone.crt", RESULTS: URL}
NO_AUTHORITY = f"{BROKER}: ssl_ca_certs names /etc/stalk/gone.crt, which cannot be read (No such file or"
# openssl takes milliseconds.
SECONDS = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's certificate, its key and its authority; and what people name in their place."""
    directory = make_certificates(tmp_path_factory.mktemp("tls") / "files")
    (directory / "text").write_text("no certificate")
    (directory / "empty").touch()
    locked = ("-aes128", "-passout", "pass:secret", "-in", "server.key", "-out", "locked.key")
    for made in (locked, ("-in", "server.key", "-pubout", "-out", "public.key")):
        subprocess.run(["openssl", "pkey", *made], cwd=directory, check=True, capture_output=True, timeout=SECONDS)
    return directory


def find_mistakes(**urls: str) -> list[str]:
    """The sentences about these URLs; none where they are accepted."""
    try:
        require_tls_files(load(urls))
    except ConfigError as error:
        return list(error.problems)
    return []


def url(files: Path, scheme: str = "rediss", **options: str) -> str:
    return f"{scheme}://redis.example.com/0?" + "&".join(f"{name}={files / file}" for name, file in options.items())


# --- TLS files


def test_files_that_can_be_used_are_taken(files: Path) -> None:
    whole = url(files, ssl_ca_certs="ca.crt", ssl_certfile="server.crt", ssl_keyfile="server.key")
    assert find_mistakes(CELERY_BROKER_URL=whole, CELERY_RESULT_BACKEND=whole) == []
    assert find_mistakes(CELERY_BROKER_URL="rediss://redis.example.com/0", CELERY_RESULT_BACKEND=URL) == []


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
@pytest.mark.parametrize(("file", "reason"), [("gone.crt", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_with_its_variable(files: Path, name: str, file: str, reason: str) -> None:
    options = {"ssl_certfile": "server.crt"} if name == "ssl_keyfile" else {}
    assert find_mistakes(CELERY_BROKER_URL=URL, CELERY_RESULT_BACKEND=url(files, **options | {name: file})) == [
        f"{RESULTS}: {name} names {files / file}, which cannot be read ({reason}): correct the path; in a container it "
        "is one inside, where the file has to be mounted (docs/connect.md)"
    ]


@pytest.mark.parametrize("file", ["text", "empty", "server.key"])
def test_an_authority_that_is_none_is_named(files: Path, file: str) -> None:
    (sentence,) = find_mistakes(CELERY_BROKER_URL=url(files, ssl_ca_certs=file))
    assert sentence.startswith(f"{BROKER}: ssl_ca_certs names {files / file}, which has no certificate in PEM form (")
    assert sentence.endswith("): correct it")


@pytest.mark.parametrize("key", ["", "ca.key", "locked.key", "public.key", "empty"])
def test_a_certificate_without_its_key_is_named(files: Path, key: str) -> None:
    named = {"ssl_certfile": "server.crt"} | ({"ssl_keyfile": key} if key else {})
    (sentence,) = find_mistakes(CELERY_BROKER_URL=url(files, **named))
    both = " and ".join(str(files / file) for file in named.values())
    assert sentence.startswith(f"{BROKER}: ssl_certfile and ssl_keyfile name {both}, which cannot be used (")
    assert sentence.endswith("): name a certificate and its key, in PEM form, the key without a password")


def test_each_url_has_a_sentence_and_none_has_its_password(files: Path) -> None:
    broker = url(files, ssl_ca_certs="gone").replace("://", "://:Zq7-s3cret@")
    results = url(files, "sentinel", ssl_ca_certs="lost")
    sentences = find_mistakes(CELERY_BROKER_URL=broker, CELERY_RESULT_BACKEND=results, CELERY_SENTINEL_MASTER="main")
    assert [sentence.partition(",")[0] for sentence in sentences] == [
        f"{BROKER}: ssl_ca_certs names {files / 'gone'}",
        f"{RESULTS}: ssl_ca_certs names {files / 'lost'}",
    ]
    assert "Zq7-s3cret" not in "".join(sentences)


# --- URLs that are not set


def test_a_publish_names_both_variables() -> None:
    with pytest.raises(UrlNotSetError, match=UNSET):
        create_app(load({})).send_task("any")


def test_where_no_result_can_be_read_the_variable_is_named_and_no_task_is_sent_that_has_one() -> None:
    app = create_app(load({BROKER: URL}))
    with pytest.raises(UrlNotSetError, match=f"^{RESULTS} must be exported"):
        _ = app.AsyncResult("any").state
    with pytest.raises(UrlNotSetError, match=f"^{RESULTS} must be exported"):
        app.send_task("any", retry=False)


def test_a_client_of_our_own_names_the_variables() -> None:
    settings = load({"REDIS_PASSWORD": "secret"})
    for url in (settings.broker_url, settings.result_url):
        with pytest.raises(UrlNotSetError, match="REDIS_PASSWORD, where the URL has no password"):
            connect(url, settings)


@pytest.mark.parametrize(
    ("settings", "configured"),
    [
        ({"STALK_RUN_DIR": "/run/stalk"}, {}),
        ({BROKER: "redis://redis:6379/0", RESULTS: "redis://redis:6379/1"}, {}),
        ({BROKER: URL, RESULTS: URL}, {}),
        ({}, {"broker_url": URL, "result_backend": URL}),
    ],
    ids=["inside the stack", "the default, set", "another URL", "configured by hand"],
)
def test_a_url_that_is_set_or_known_to_be_right_is_used(settings: dict[str, str], configured: dict[str, str]) -> None:
    app = create_app(load(settings))
    app.conf.update(configured)
    assert app.connection_for_write().as_uri()
    assert app.backend.client


# --- Commands


@pytest.mark.parametrize(
    ("urls", "says", "command"),
    [
        (GONE, NO_AUTHORITY, "-m services.launch worker"),
        (GONE, NO_AUTHORITY, "-m services.launch node --hostname=node0@here"),
        (GONE, NO_AUTHORITY, "-m services.launch beat"),
        (GONE, NO_AUTHORITY, "-m services.launch flower"),
        (GONE, NO_AUTHORITY, "-m celery -A services.app worker"),
        (GONE, NO_AUTHORITY, "-m services status"),
        (GONE, NO_AUTHORITY, "-m services.commands.check"),
        (GONE, NO_AUTHORITY, "-c __import__('services.app')"),
        ({}, UNSET, "-m celery -A services.app worker"),
        ({}, UNSET, "-m celery -A services.app beat"),
        ({}, UNSET, "-m services status"),
    ],
)
def test_a_command_is_refused_in_one_sentence(
    checkout: Checkout, urls: dict[str, str], says: str, command: str
) -> None:
    (sentence,) = run_refused(checkout, *command.split(), **urls)
    assert says in sentence
