"""Who gets into Flower and may change something: two logins, and users that proxies have logged in."""

import base64
import http.client
import re
import socket
from typing import Any

import pytest
from flower import urls
from tornado.web import RequestHandler

from tests.integration.flower.conftest import Serve
from tests.support.redis.server import RedisServer
from tests.support.served_flower import (
    IN_PROXIES_NETWORK,
    LOGGED_IN_BY_PROXY,
    LOGIN,
    PAGES,
    PASSWORD,
    PROXY,
    READ_ONLY_LOGIN,
    STRANGER,
    TIMEOUT,
    Answer,
    ServedFlower,
    basic,
    send_events,
)

# Options of a request.
READ_ONLY: dict[str, Any] = {"login": READ_ONLY_LOGIN}
BY_PROXY: dict[str, Any] = {"login": None, "headers": LOGGED_IN_BY_PROXY, "source": PROXY}
INSIDE = [(None, path) for path in (*PAGES, "/nowhere", "/login", "/healthcheck/")]
# Outside the prefix; the last is the whole server.
OUTSIDE = [("", path) for path in ("/", "/healthcheck", "/metrics", "/flower", "/favicon.ico", "/nowhere", "*")]


@pytest.mark.parametrize(("prefix", "path"), [*INSIDE, *OUTSIDE])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"])
def test_nothing_is_answered_without_the_login(
    flower: ServedFlower, method: str, prefix: str | None, path: str
) -> None:
    answer = flower.ask(path, method, login=None, prefix=prefix)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert answer.body in (b"", b"Log in with FLOWER_BASIC_AUTH.\n")
    assert not [name for name in answer.headers if name.startswith("Access-Control-")]


WRONG_LOGINS = (
    "",
    "Basic",
    "Basic !!!",
    "Basic " + base64.b64encode(b"\xff\xfe:\x00").decode(),
    basic("admin:wrong"),
    basic("admin:a"),
    basic("b:ü ✓"),
    basic("evil:evil"),
    basic(LOGIN).replace("Basic", "Bearer"),
    basic(f"guest:{PASSWORD[:-1]}"),
    basic("guest:"),
)
CLAIMS = {"X-Forwarded-For": PROXY, "X-Real-Ip": PROXY, "Forwarded": f"for={PROXY}"}


@pytest.mark.parametrize(
    ("source", "headers"),
    [
        *(("", {"Authorization": wrong}) for wrong in WRONG_LOGINS),
        # A proxy that names nobody.
        *((PROXY, headers) for headers in ({}, {"Remote-User": ""}, {"Remote-User": "  "}, {"Remote_User": "alice"})),
        # A name that comes from elsewhere.
        (STRANGER, LOGGED_IN_BY_PROXY),
        (STRANGER, {**LOGGED_IN_BY_PROXY, **CLAIMS}),
    ],
)
def test_a_wrong_login_is_refused(flower: ServedFlower, source: str, headers: dict[str, str]) -> None:
    answer = flower.ask("/api/workers", login=None, headers=headers, source=source)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert "Traceback" not in flower.process.log()
    # Nor does it keep a right one out.
    if "Authorization" not in headers:
        assert flower.ask("/api/workers", headers=headers, source=source).status == 200


def test_a_wrong_login_is_logged_and_a_missing_one_is_not(flower: ServedFlower) -> None:
    flower.ask("/missing", login=None)
    flower.ask("/wrong", login="admin:guessed")
    flower.until(lambda: flower.process.count("401 GET /flower/wrong "), TIMEOUT, "the wrong login is logged")
    assert not flower.process.count("401 GET /flower/missing ")
    assert "guessed" not in flower.process.log()


@pytest.mark.parametrize(
    ("user", "options"),
    [
        ("admin", {}),
        ("", READ_ONLY),
        ("alice@example.com", BY_PROXY),
        ("alice@example.com", BY_PROXY | {"source": IN_PROXIES_NETWORK}),
    ],
    ids=["login", "read-only", "proxy", "proxies'-network"],
)
def test_whoever_is_let_in_sees_every_page_and_is_named_in_the_log_when_he_changes_something(
    flower: ServedFlower, request: pytest.FixtureRequest, user: str, options: dict[str, Any]
) -> None:
    assert {path: flower.ask(path, **options).status for path in PAGES} == dict.fromkeys(PAGES, 200)
    if user:
        path = f"/api/worker/shutdown/{request.node.callspec.id}@shop"
        assert flower.ask(path, "POST", **options).status == 404
        line = f"'{user}' has asked for POST /flower{path}, answered 404"
        flower.until(lambda: flower.process.count(re.escape(line)), TIMEOUT, "the log says who it was")


@pytest.mark.parametrize(
    ("login", "status"), [("", 401), (f"Authorization: {basic(READ_ONLY_LOGIN)}\r\n", 403)], ids=["none", "read-only"]
)
def test_the_body_of_a_request_that_is_refused_is_not_waited_for(flower: ServedFlower, login: str, status: int) -> None:
    head = f"POST /flower/api/task/send-task/a HTTP/1.1\r\nHost: x\r\n{login}Content-Length: 90000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", flower.port), timeout=TIMEOUT) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_the_health_check_is_free(flower: ServedFlower) -> None:
    assert flower.healthy().text == "OK"
    assert flower.healthy("HEAD").text == ""
    # Flower listens on every address.
    assert flower.healthy(host="127.0.0.2").text == "OK"
    assert flower.ask("/healthcheck", "OPTIONS", login=None).status == 405
    assert flower.ask("/healthcheck", "POST", login=None).status in (403, 405)


@pytest.mark.parametrize("options", [{}, BY_PROXY], ids=["browser's", "proxy's"])
def test_another_site_cannot_use_the_login(flower: ServedFlower, worker: str, options: dict[str, Any]) -> None:
    for signs in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
    ):
        headers = options.get("headers", {}) | signs
        answer = flower.ask(f"/api/worker/shutdown/{worker}", "POST", **options | {"headers": headers})
        assert (answer.status, answer.text.endswith("request forbidden")) == (403, True), signs


def test_flower_refuses_to_start_without_a_login(serve: Serve) -> None:
    output = serve(None, FLOWER_BASIC_AUTH="").refused()
    assert output.startswith("FLOWER_BASIC_AUTH is not set: ")
    assert output.count("\n") == 1


def test_flower_says_which_port_is_taken(serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104 - as Flower does
        taken.listen()
        port = taken.getsockname()[1]
        last = serve(None, port=port).refused().splitlines()[-1]
    assert last.startswith(f"Flower cannot listen on port {port} (Address already in use)")


# Routes that the read-only login may use; none changes anything. Check a route of a newer Flower before you add it.
READ_ROUTES = {
    *("/", "/workers", "/worker/(.+)", "/task/(.+)", "/tasks", "/tasks/datatable", "/broker", "/metrics"),
    *("/api/workers", "/api/tasks", "/api/task/types", "/api/queues/length", "/api/task/info/(.*)"),
    *("/api/task/result/(.+)", "/healthcheck", "/static/(.*)", "/logout", ".*"),
}


def routes() -> dict[str, type[RequestHandler]]:
    """The handler of each pattern of Flower's routes."""
    found = {}
    for route in urls.handlers:
        pattern, handler = (route[0], route[1]) if isinstance(route, tuple) else (route.regex.pattern, route.target)
        found[pattern.removesuffix("$")] = handler
    return found


def answers(handler: type[RequestHandler], method: str) -> bool:
    return getattr(handler, method.lower()) is not RequestHandler._unimplemented_method


def test_every_route_either_writes_or_is_known_to_be_read_only() -> None:
    looked_at = {path for path, handler in routes().items() if answers(handler, "GET") or answers(handler, "HEAD")}
    assert looked_at == READ_ROUTES
    acting = routes().keys() - looked_at
    assert "/api/worker/shutdown/(.+)" in acting
    assert len(acting) > 10


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("source", ["", PROXY, STRANGER])
def test_the_read_only_login_writes_on_no_route_whatever_a_proxy_says(
    flower: ServedFlower, source: str, method: str
) -> None:
    options = READ_ONLY | ({"source": source, "headers": LOGGED_IN_BY_PROXY} if source else {})
    paths = {re.sub(r"\(.*\)", "x", pattern).removesuffix("?") for pattern in routes()} - {"/healthcheck"}
    for path in sorted(paths | {"/nowhere"}):
        answer = flower.ask(path.replace(".*", "/nowhere"), method, **options)
        if (method, path) == ("POST", "/tasks/datatable"):
            # The arguments are missing, which test_pages.py sends.
            assert answer.status == 400
            continue
        assert answer.status == 403, path
        assert answer.text == (
            "This login sees everything and changes nothing: to do that, log in with FLOWER_BASIC_AUTH.\n"
        )
        assert "WWW-Authenticate" not in answer.headers


def buttons(page: str) -> set[str]:
    """Ids of the buttons that change something; others copy text or open a menu, and have other ids."""
    return set(re.findall(r"<button[^>]* id=\"((?:worker|task)-[^\"]*)\"", page)) - {"worker-group"}


def test_the_read_only_login_has_no_buttons(flower: ServedFlower, redis: RedisServer, worker: str, task: str) -> None:
    page = f"/worker/{worker}"
    assert {"worker-shutdown", "worker-pool-grow", "worker-add-consumer"} <= buttons(flower.ask(page).text)
    assert buttons(flower.ask(page, **READ_ONLY).text) == set()
    [started] = send_events(redis.url(), ended=False)
    flower.wait_for_task(started)
    page = f"/task/{started}"
    flower.until(lambda: buttons(flower.ask(page).text) == {"task-terminate"}, TIMEOUT, "the task has started")
    assert buttons(flower.ask(page, **READ_ONLY).text) == set()
    # The page of one login is not cached for the other.
    assert buttons(flower.ask(page).text) == {"task-terminate"}


def test_a_header_that_is_there_twice_is_refused(flower: ServedFlower) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", flower.port, timeout=TIMEOUT, source_address=(PROXY, 0))
    connection.putrequest("GET", "/flower/api/workers")
    for name in ("mallory", "alice"):
        connection.putheader("Remote-User", name)
    connection.endheaders()
    answer = Answer(connection.getresponse())
    connection.close()
    assert answer.status == 400
    assert answer.text == "Remote-User is there 2 times: have the proxy replace what clients send.\n"
