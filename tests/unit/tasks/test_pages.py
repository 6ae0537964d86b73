"""services.tasks.pages, against a real server on this host."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from celery.exceptions import Retry
from celery.signals import task_retry

from services.tasks import pages
from services.tasks.pages import MAX_REDIRECTS, MAX_RETRIES, PageError, PageUnavailableError, fetch

BODY = b"<h1>a page</h1>\n"

Answer = Callable[[BaseHTTPRequestHandler], object]


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    """An answer with this status, body and headers."""

    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return send


class Site:
    """A web server: each path gives the answers that a test has set, one after the other, and repeats the last."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[str] = []
        # Set when the test is over: what an answer that hangs waits for.
        self.over = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append(self.path)
                answers = site.answers[self.path]
                (answers.pop(0) if len(answers) > 1 else answers[0])(self)

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def on(self, path: str, *answers: Answer) -> str:
        """Set the answers of a path and return its URL."""
        self.answers[path] = list(answers)
        return self.url + path

    def send_without_end(self, body: bytes, pause: float) -> Answer:
        """An answer that repeats its body until the test is over."""

        def send(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            with suppress(OSError):
                while not self.over.wait(pause):
                    request.wfile.write(body)

        return send


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    # The poll interval is what shutdown may have to wait.
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.over.set()
    site.server.shutdown()
    site.server.server_close()
    thread.join()


@pytest.mark.parametrize(("code", "body"), [(200, BODY), (204, b"")])
def test_a_page_is_described_by_status_length_and_hash(site: Site, code: int, body: bytes) -> None:
    url = site.on("/", status(code, body))
    # Through JSON, as its result is stored.
    page = json.loads(json.dumps(fetch(url)))
    assert page.pop("seconds") >= 0
    assert page == {"url": url, "status": code, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_redirects_are_followed_to_their_end(site: Site) -> None:
    site.on("/end", status(200, BODY))
    site.on("/middle", status(301, Location=f"{site.url}/end"))
    page = fetch(site.on("/begin", status(302, Location="/middle")))
    assert (page["url"], page["bytes"]) == (f"{site.url}/end", len(BODY))


def test_redirects_in_a_circle_end(site: Site) -> None:
    url = site.on("/circle", status(302, Location="/circle"))
    with pytest.raises(PageError, match=f"more than {MAX_REDIRECTS} redirects"):
        fetch(url)
    assert len(site.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "data:,hello", "http://:80/"])
def test_a_redirect_to_anything_but_http_is_refused(site: Site, target: str) -> None:
    result = fetch.apply(args=(site.on("/", status(302, Location=target)),))
    assert isinstance(result.result, ValueError)
    assert site.requests == ["/"]


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com", "/etc/passwd", "file:///etc/passwd", "ftp://example.com/", "http://", "http://:80/"),
        *("http://example.com:99999/", "http://example.com:port/", "http://[::1/"),
        *("http://127.0.0.1:1/a b", "http://127.0.0.1:1/\u00e9"),
        "http://user:hunter2@example.com/",
    ],
)
def test_what_is_no_http_url_is_refused_and_no_password_repeated(url: str) -> None:
    with pytest.raises(ValueError) as error:
        fetch(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_above_zero(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be above 0 seconds"):
        fetch("http://127.0.0.1/", timeout)


def speak_smtp(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"220 mail ready\r\n")


@pytest.mark.parametrize(
    "failure",
    [
        *(status(code) for code in (429, 500, 502, 503, 504)),
        # The connection breaks off.
        status(200, BODY[:5], Content_Length=str(len(BODY))),
        speak_smtp,
    ],
    ids=["429", "500", "502", "503", "504", "half", "smtp"],
)
def test_what_may_pass_is_tried_again(site: Site, failure: Answer) -> None:
    page = fetch.apply(args=(site.on("/", failure, failure, status(200, BODY)),)).get()
    assert (page["status"], page["bytes"]) == (200, len(BODY))
    assert len(site.requests) == 3


# A redirect to nowhere is one of them.
@pytest.mark.parametrize("code", [302, 400, 401, 403, 404, 410, 451])
def test_a_status_that_will_not_pass_is_not_tried_again(site: Site, code: int) -> None:
    result = fetch.apply(args=(site.on("/", status(code)),))
    assert isinstance(result.result, PageError)
    assert f"status {code}" in str(result.result)
    assert len(site.requests) == 1


def test_retries_wait_twice_as_long_each_time_and_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def note(reason: Retry, **_: object) -> None:
        waits.append(reason.when)

    # The longest wait that the jitter can choose.
    monkeypatch.setattr("random.randrange", lambda stop: stop - 1)
    task_retry.connect(note)
    try:
        result = fetch.apply(args=(site.on("/", status(503)),))
    finally:
        task_retry.disconnect(note)
    assert waits == [2, 4, 8, 16, 32]
    assert isinstance(result.result, PageUnavailableError)
    assert len(site.requests) == 1 + MAX_RETRIES


def test_a_refused_connection_is_tried_again() -> None:
    # Nobody is given port 1, as a port that was free a moment ago may be.
    result = fetch.apply(args=("http://127.0.0.1:1/",))
    assert isinstance(result.result, PageUnavailableError)


def test_a_server_that_hangs_or_drips_is_given_up_after_the_timeout(site: Site) -> None:
    hangs = site.on("/hangs", lambda _: site.over.wait(10))
    # A byte well before each wait runs out: only the whole takes too long.
    drips = site.on("/drips", site.send_without_end(b".", pause=0.01))
    for url in (hangs, drips):
        with pytest.raises(PageUnavailableError, match="timed out"):
            fetch(url, timeout=0.1)


def test_a_page_is_read_up_to_the_bound_and_then_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_BYTES", len(BODY))
    assert fetch(site.on("/", status(200, BODY)))["bytes"] == len(BODY)
    result = fetch.apply(args=(site.on("/endless", site.send_without_end(BODY[:3], pause=0)),))
    assert isinstance(result.result, PageError)
    assert f"more than {len(BODY)} bytes" in str(result.result)
    assert site.requests == ["/", "/endless"]


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert fetch(site.on("/", status(200, BODY)))["status"] == 200
