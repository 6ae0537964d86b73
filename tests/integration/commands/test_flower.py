"""services.flower.server, served for real: over HTTP, with a real Redis and real workers."""

from __future__ import annotations

import asyncio
import base64
import html
import http.client
import json
import os
import pickle
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import pytest
from celery import Celery
from flower import urls
from tornado.web import RequestHandler

from config import load
from services.broker.client import connect
from services.broker.keys import lists_of
from services.flower.server import HEADERS, MAX_WAITING_EVENTS, STYLE, Events, Pulse, host_to_ask
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.redis.server import RedisServer, make_certificates, require_tls
from tests.support.waiting import GaveUp
from tests.support.world import World, forget_results

# Of whatever comes in any case: Flower looks at most things once a second.
PATIENCE = 120
# Everything that a URL, an option parser or a comparison of text could stumble over.
REDIS_PASSWORD = "r:e,d/i@s%20"
PASSWORD = "a,b:ü ✓"
LOGIN = f"admin:{PASSWORD}"
READ_ONLY_LOGIN = f"guest:{PASSWORD}"
# Each address of loopback is a machine of its own here.
PROXY, IN_PROXIES_NETWORK, STRANGER = "127.0.0.7", "127.7.7.7", "127.0.0.8"
LOGGED_IN_BY_PROXY = {"Remote-User": "alice@example.com"}

RUNNER = """
import json, os, pathlib, sys
from config import ConfigError, load
from config.celery import build_celery_configuration
from services.application import Stalk
from services.flower.server import serve

given = json.loads(os.environ["GIVEN"])
try:
    settings = load(given["settings"])
    app = Stalk("stalk")
    app.conf.update(build_celery_configuration(settings))
    app.settings = settings
    beat = pathlib.Path(given["beat"])
    serve(app, settings, port=given["port"], database=given["database"], heartbeat=beat.touch)
except ConfigError as error:
    print(error)
    sys.exit(2)
"""

TASKS = """
import os
from celery import Celery

app = Celery("shop", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
app.conf.update(worker_send_task_events=True, task_send_sent_event=True)

@app.task(name="shop.add")
def add(x, y):
    return x + y
"""


class Answer:
    """What a server said to one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ServedFlower:
    """Flower in a process of its own, as services/launch.py serves it."""

    def __init__(
        self, world: World, directory: Path, settings: dict[str, str], surroundings: dict[str, str], port: int
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.world, self.port = world, port
        self.database, self.heartbeat = directory / "flower.db", directory / "heartbeat"
        self.settings = load(settings)
        self.prefix = f"/{self.settings.flower.url_prefix}".rstrip("/")
        given = {"settings": settings, "port": port, "database": str(self.database), "beat": str(self.heartbeat)}
        environment = {"PYTHONPATH": str(world.checkout.path), "GIVEN": json.dumps(given), **surroundings}
        (directory / "served.py").write_text(RUNNER)
        self.process = world.python("flower", "-m served", environment, directory)

    def until(self, check: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait, but not for a Flower that has ended."""

        def look() -> Any:
            assert self.process.alive, f"Flower ended before {what}\n{self.process.tail()}"
            return check()

        return self.world.wait_until(look, seconds, what)

    def ready(self) -> ServedFlower:
        self.until(lambda: self.health() == 200, PATIENCE, "Flower is healthy")
        return self

    def refused(self) -> str:
        """What it says when it does not start."""
        assert self.process.wait(PATIENCE) == 2, self.process.tail()
        return self.process.log()

    def health(self) -> int:
        """The status of the health check; 0 where nothing answers."""
        try:
            return self.ask("/healthcheck", login=None).status
        except OSError:
            return 0

    def healthy(self, method: str = "GET", host: str = "127.0.0.1") -> Answer:
        """What somebody without a login hears from the health check once all is well: a busy Redis may answer late."""

        def look() -> Answer | None:
            answer = self.ask("/healthcheck", method, login=None, host=host)
            return answer if answer.status == 200 else None

        found: Answer = self.until(look, PATIENCE, "the health check says that all is well")
        return found

    def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        login: str | None = LOGIN,
        headers: dict[str, str] | None = None,
        body: str | None = None,
        host: str = "127.0.0.1",
        source: str = "",
        prefix: str | None = None,
    ) -> Answer:
        """One request under the prefix; from the address `source` where that matters."""
        sent = {**({"Authorization": basic(login)} if login is not None else {}), **(headers or {})}
        comes_from = (source, 0) if source else None
        connection = http.client.HTTPConnection(host, self.port, timeout=PATIENCE, source_address=comes_from)
        try:
            connection.request(method, (self.prefix if prefix is None else prefix) + path, body, sent)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("/api/tasks").json
        return found

    def wait_for_task(self, uuid: str) -> None:
        self.until(lambda: uuid in self.tasks(), PATIENCE, f"task {uuid} is known")

    def wait_for_save(self, uuid: str) -> None:
        on_disk = lambda: self.database.exists() and uuid.encode() in self.database.read_bytes()  # noqa: E731
        self.until(on_disk, PATIENCE, f"task {uuid} is saved")


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def start_flower(
    world: World,
    redis: RedisServer | None,
    directory: Path,
    settings: dict[str, str],
    surroundings: dict[str, str] | None = None,
) -> ServedFlower:
    urls = {"CELERY_BROKER_URL": redis.url(), "CELERY_RESULT_BACKEND": redis.url()} if redis else {}
    given = {**urls, "FLOWER_BASIC_AUTH": LOGIN, "FLOWER_STATE_SAVE_INTERVAL": "1", **settings}
    return ServedFlower(world, directory, given, surroundings or {}, free_port())


def start_worker(world: World, broker: str, name: str) -> Process:
    """A real Celery worker, ready."""
    directory = world.path("shop")
    directory.mkdir()
    (directory / "shop.py").write_text(TASKS)
    command = f"-m celery -A shop worker -P solo -n {name} -l INFO"
    environment = {"PATH": os.environ["PATH"], "BROKER": broker, "RESULTS": broker}
    worker = world.python("worker", command, environment, directory, LIBRARIES_ONLY)
    world.wait_until(lambda: worker.count(r" ready\.$"), PATIENCE, f"{name} is ready")
    return worker


@pytest.fixture(scope="module")
def redis(shared_world: World) -> RedisServer:
    """A server for tests that do it no harm; each that counts messages has a database of its own."""
    return shared_world.redis(REDIS_PASSWORD)


@pytest.fixture(scope="module")
def worker(shared_world: World, redis: RedisServer) -> str:
    """The name of a worker that stays."""
    start_worker(shared_world, redis.url(), "keeper@shop")
    return "keeper@shop"


@pytest.fixture(scope="module")
def flower(shared_world: World, redis: RedisServer) -> ServedFlower:
    """Flower under a prefix, in surroundings that want everything otherwise."""
    directory = shared_world.path("flower")
    directory.mkdir()
    (directory / "flowerconfig.py").write_text("basic_auth = ['evil:evil']\nurl_prefix = 'evil'\n")
    hostile = {
        "FLOWER_ADDRESS": "127.0.0.3",
        "FLOWER_BASIC_AUTH": "evil:evil",
        "FLOWER_MAX_TASKS": "1",
        "FLOWER_PORT": str(free_port()),
        "FLOWER_READ_ONLY": "true",
        "FLOWER_UNAUTHENTICATED_API": "true",
        "FLOWER_URL_PREFIX": "evil",
    }
    settings = {
        "FLOWER_URL_PREFIX": "/flower",
        "LOG_LEVEL": "debug",
        "FLOWER_READ_ONLY_AUTH": READ_ONLY_LOGIN,
        "FLOWER_TRUSTED_HEADER": next(iter(LOGGED_IN_BY_PROXY)),
        "FLOWER_TRUSTED_PROXIES": f"{PROXY},127.7.0.0/16",
    }
    return start_flower(shared_world, redis, directory, settings, hostile).ready()


@pytest.fixture
def serve(world: World) -> Callable[..., ServedFlower]:
    """Start a Flower of the test's own; started again, it finds the last one's database."""

    def start(redis: RedisServer | None, **settings: str) -> ServedFlower:
        return start_flower(world, redis, world.directory / "flower", settings)

    return start


def send_events(broker: str, count: int = 1, sender: str = "ghost@shop", *, ended: bool = True) -> list[str]:
    """Publish the events of `count` tasks that worked, or run for ever; returns their ids."""
    ids = [str(uuid4()) for _ in range(count)]
    with (
        Celery("sender", broker=broker, set_as_current=False) as app,
        app.connection() as connection,
        app.events.Dispatcher(connection, hostname=sender) as dispatcher,
    ):
        dispatcher.send("worker-heartbeat", freq=1, active=0, processed=0, loadavg=[0, 0, 0], sw_ident="ghost")
        for uuid in ids:
            about = {"args": "()", "kwargs": "{}", "root_id": uuid, "parent_id": None, "retries": 0}
            dispatcher.send("task-received", uuid=uuid, name="shop.ghost", eta=None, expires=None, **about)
            dispatcher.send("task-started", uuid=uuid)
            if ended:
                dispatcher.send("task-succeeded", uuid=uuid, result="None", runtime=0.01)
        # Flower runs in UTC here: a sender east of it would live for hours by its heartbeat (celery 5.7).
        if not ended:
            dispatcher.send("worker-offline", freq=1)
    return ids


def send_sent_event(broker: str, sender: str) -> None:
    """Publish the event of a task that `sender` has sent, and that nobody will ever take."""
    with (
        Celery("sender", broker=broker, set_as_current=False) as app,
        app.connection() as connection,
        app.events.Dispatcher(connection, hostname=sender) as dispatcher,
    ):
        dispatcher.send("task-sent", uuid=str(uuid4()), name="shop.ghost", args="()", kwargs="{}", retries=0)


def run_task(broker: str) -> str:
    """Let a worker run a chain of two; returns the id of the second task, which has a parent."""
    with Celery("client", broker=broker, backend=broker, set_as_current=False) as app:
        first = app.signature("shop.add", (1, 2))
        result = (first | app.signature("shop.add", (3,))).apply_async()
        assert result.get(timeout=PATIENCE) == 6
        forget_results(app)
        return str(result.id)


# ── login ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# What the page of tasks asks for.
TABLE = "draw=1&start=0&length=10&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name&search[value]="
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
OPEN_TO_THE_LOGIN = ["/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers", "/static/js/flower.js"]


@pytest.mark.parametrize("path", [*OPEN_TO_THE_LOGIN, "/nowhere", "/login", "/healthcheck/"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"])
def test_nothing_is_answered_without_the_login(flower: ServedFlower, method: str, path: str) -> None:
    answer = flower.ask(path, method, login=None)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert answer.body in (b"", b"Log in with FLOWER_BASIC_AUTH.\n")
    assert not [name for name in answer.headers if name.startswith("Access-Control-")]


@pytest.mark.parametrize(
    "authorization",
    [
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
    ],
)
def test_a_wrong_login_is_refused_without_a_traceback(flower: ServedFlower, authorization: str) -> None:
    answer = flower.ask("/api/workers", login=None, headers={"Authorization": authorization})
    assert answer.status == 401
    assert "WWW-Authenticate" in answer.headers
    assert "Traceback" not in flower.process.log()


def test_a_wrong_login_is_logged_and_a_missing_one_is_not(flower: ServedFlower) -> None:
    flower.ask("/missing", login=None)
    flower.ask("/wrong", login="admin:guessed")
    flower.until(lambda: flower.process.count("401 GET /flower/wrong "), PATIENCE, "the wrong login is logged")
    assert not flower.process.count("401 GET /flower/missing ")
    assert "guessed" not in flower.process.log()


@pytest.mark.parametrize("path", OPEN_TO_THE_LOGIN)
def test_a_login_with_a_comma_a_colon_and_an_umlaut_opens_everything(flower: ServedFlower, path: str) -> None:
    assert flower.ask(path).status == 200


@pytest.mark.parametrize("path", ["/", "/healthcheck", "/metrics", "/flower", "/favicon.ico", "/nowhere"])
def test_paths_outside_the_prefix_need_the_login_too(flower: ServedFlower, path: str) -> None:
    assert flower.ask(path, login=None, prefix="").status == 401


def test_options_of_the_whole_server_need_the_login(flower: ServedFlower) -> None:
    assert flower.ask("*", "OPTIONS", login=None, prefix="").status == 401


def test_a_body_is_not_waited_for_without_the_login(flower: ServedFlower) -> None:
    with socket.create_connection(("127.0.0.1", flower.port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /flower/api/workers HTTP/1.1\r\nHost: x\r\nContent-Length: 90000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_the_health_check_is_free(flower: ServedFlower) -> None:
    assert flower.healthy().text == "OK"
    assert flower.healthy("HEAD").text == ""
    assert flower.ask("/healthcheck", "OPTIONS", login=None).status == 405
    assert flower.ask("/healthcheck", "POST", login=None).status in (403, 405)


def test_another_site_cannot_press_buttons_with_the_browsers_login(flower: ServedFlower, worker: str) -> None:
    path = f"/api/worker/shutdown/{worker}"
    assert flower.ask(path, "POST", headers={"Sec-Fetch-Site": "cross-site"}).status == 403
    assert flower.ask(path, "POST", headers={"Origin": "https://evil.example.com"}).status == 403


def test_flower_listens_on_every_address(flower: ServedFlower) -> None:
    flower.healthy(host="127.0.0.2")


def test_flower_refuses_to_start_without_a_login(serve: Callable[..., ServedFlower]) -> None:
    said = serve(None, FLOWER_BASIC_AUTH="").refused()
    assert said.startswith("FLOWER_BASIC_AUTH is not set: ")
    assert said.count("\n") == 1


def test_flower_says_which_port_is_taken(serve: Callable[..., ServedFlower], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104 - as Flower does
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: port)
        last = serve(None).refused().splitlines()[-1]
    assert last.startswith(f"Flower cannot listen on port {port} (Address already in use)")


# ── the login that only looks ──────────────────────────────────────────────────────────────────────────────────────

ACTING = ("POST", "PUT", "DELETE", "PATCH")
# What somebody who only looks may have answered, all of it, and nothing of it changes anything. A route of a newer
# Flower has to be looked at before it stands here.
LOOKED_AT = {
    *("/", "/workers", "/worker/(.+)", "/task/(.+)", "/tasks", "/tasks/datatable", "/broker", "/metrics"),
    *("/api/workers", "/api/tasks", "/api/task/types", "/api/queues/length", "/api/task/info/(.*)"),
    *("/api/task/result/(.+)", "/healthcheck", "/static/(.*)", "/logout", ".*"),
}


def routes() -> dict[str, type[RequestHandler]]:
    """Every pattern of an address of Flower's, and what answers there."""
    found = {}
    for route in urls.handlers:
        pattern, handler = (route[0], route[1]) if isinstance(route, tuple) else (route.regex.pattern, route.target)
        found[pattern.removesuffix("$")] = handler
    return found


def answers(handler: type[RequestHandler], method: str) -> bool:
    return getattr(handler, method.lower()) is not RequestHandler._unimplemented_method


def test_every_route_is_one_that_acts_or_one_that_is_known_to_change_nothing() -> None:
    looked_at = {path for path, handler in routes().items() if answers(handler, "GET") or answers(handler, "HEAD")}
    assert looked_at == LOOKED_AT
    acting = routes().keys() - looked_at
    assert "/api/worker/shutdown/(.+)" in acting
    assert len(acting) > 10


@pytest.mark.parametrize("method", ACTING)
def test_the_login_that_only_looks_is_refused_on_every_route_that_acts(flower: ServedFlower, method: str) -> None:
    paths = {re.sub(r"\(.*\)", "x", pattern).removesuffix("?") for pattern in routes()} - {"/healthcheck"}
    for path in sorted(paths | {"/nowhere"}):
        answer = flower.ask(path.replace(".*", "/nowhere"), method, login=READ_ONLY_LOGIN)
        if (method, path) == ("POST", "/tasks/datatable"):
            # It lacks its arguments; the test below has them.
            assert answer.status == 400
            continue
        assert answer.status == 403, path
        assert answer.text == (
            "This login sees everything and changes nothing: to do that, log in with FLOWER_BASIC_AUTH.\n"
        )
        assert "WWW-Authenticate" not in answer.headers


@pytest.mark.parametrize("path", OPEN_TO_THE_LOGIN)
def test_the_login_that_only_looks_opens_everything(flower: ServedFlower, path: str) -> None:
    assert flower.ask(path, login=READ_ONLY_LOGIN).status == 200


def test_the_table_of_tasks_is_filled_for_who_only_looks(flower: ServedFlower, task: str) -> None:
    rows = flower.ask("/tasks/datatable", "POST", login=READ_ONLY_LOGIN, body=TABLE, headers=FORM).json["data"]
    assert task in [row["uuid"] for row in rows]


def test_a_body_is_not_waited_for_from_who_only_looks(flower: ServedFlower) -> None:
    with socket.create_connection(("127.0.0.1", flower.port), timeout=PATIENCE) as connection:
        login = f"Authorization: {basic(READ_ONLY_LOGIN)}\r\n"
        connection.sendall(
            f"POST /flower/api/task/send-task/a HTTP/1.1\r\nHost: x\r\n{login}Content-Length: 9\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


def buttons(page: str) -> set[str]:
    """What acts on a page, by its id; what only copies text or opens a menu has none that begins so."""
    return set(re.findall(r"<button[^>]* id=\"((?:worker|task)-[^\"]*)\"", page)) - {"worker-group"}


def test_who_only_looks_sees_no_button_that_acts(
    flower: ServedFlower, redis: RedisServer, worker: str, task: str
) -> None:
    page = f"/worker/{worker}"
    assert {"worker-shutdown", "worker-pool-grow", "worker-add-consumer"} <= buttons(flower.ask(page).text)
    assert buttons(flower.ask(page, login=READ_ONLY_LOGIN).text) == set()
    [started] = send_events(redis.url(), ended=False)
    flower.wait_for_task(started)
    page = f"/task/{started}"
    flower.until(lambda: buttons(flower.ask(page).text) == {"task-terminate"}, PATIENCE, "the task has started")
    assert buttons(flower.ask(page, login=READ_ONLY_LOGIN).text) == set()
    # Neither is shown what was made for the other one.
    assert buttons(flower.ask(page).text) == {"task-terminate"}


def test_who_acts_is_logged(flower: ServedFlower) -> None:
    assert flower.ask("/api/worker/shutdown/nobody@shop", "POST").status == 404
    line = "'admin' has asked for POST /flower/api/worker/shutdown/nobody@shop, answered 404"
    flower.until(lambda: flower.process.count(re.escape(line)), PATIENCE, "the log says who it was")


# ── proxies that have logged the user in ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("source", [PROXY, IN_PROXIES_NETWORK])
def test_who_is_logged_in_by_a_proxy_needs_no_other_login_and_acts(flower: ServedFlower, source: str) -> None:
    def ask(path: str, method: str = "GET") -> Answer:
        return flower.ask(path, method, login=None, headers=LOGGED_IN_BY_PROXY, source=source)

    assert {path: ask(path).status for path in OPEN_TO_THE_LOGIN} == dict.fromkeys(OPEN_TO_THE_LOGIN, 200)
    assert ask(f"/api/worker/shutdown/{source}", "POST").status == 404
    line = f"'alice@example.com' has asked for POST /flower/api/worker/shutdown/{source}, answered 404"
    flower.until(lambda: flower.process.count(re.escape(line)), PATIENCE, "the log says who it was")


@pytest.mark.parametrize(
    "claims",
    [{}, {"X-Forwarded-For": PROXY, "X-Real-Ip": PROXY, "Forwarded": f"for={PROXY}"}],
    ids=["silent", "claims-to-be-the-proxy"],
)
def test_a_header_from_elsewhere_is_ignored(flower: ServedFlower, claims: dict[str, str]) -> None:
    headers = {**LOGGED_IN_BY_PROXY, **claims}
    answer = flower.ask("/api/workers", login=None, headers=headers, source=STRANGER)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize("source", [PROXY, STRANGER])
def test_who_has_the_login_that_only_looks_only_looks_whatever_a_proxy_says(flower: ServedFlower, source: str) -> None:
    path, login = "/api/worker/shutdown/x", READ_ONLY_LOGIN
    assert flower.ask(path, "POST", login=login, headers=LOGGED_IN_BY_PROXY, source=source).status == 403


@pytest.mark.parametrize("headers", [{}, {"Remote-User": ""}, {"Remote-User": "  "}, {"Remote_User": "alice"}])
def test_a_proxy_that_names_nobody_is_asked_for_the_login(flower: ServedFlower, headers: dict[str, str]) -> None:
    assert flower.ask("/api/workers", login=None, headers=headers, source=PROXY).status == 401
    assert flower.ask("/api/workers", headers=headers, source=PROXY).status == 200


def test_a_header_that_is_there_twice_is_refused(flower: ServedFlower) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", flower.port, timeout=PATIENCE, source_address=(PROXY, 0))
    connection.putrequest("GET", "/flower/api/workers")
    for name in ("mallory", "alice"):
        connection.putheader("Remote-User", name)
    connection.endheaders()
    answer = Answer(connection.getresponse())
    connection.close()
    assert answer.status == 400
    assert answer.text == "Remote-User is there 2 times: have the proxy replace what clients send.\n"


def test_another_site_cannot_press_buttons_with_the_proxys_login(flower: ServedFlower) -> None:
    for signs in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
    ):
        headers = {**LOGGED_IN_BY_PROXY, **signs}
        answer = flower.ask("/api/worker/shutdown/x", "POST", login=None, headers=headers, source=PROXY)
        assert (answer.status, answer.text.endswith("request forbidden")) == (403, True), signs


# ── pages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Links(HTMLParser):
    """Every address that a page names: (tag, address)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value) for name, value in attrs if name in ("href", "src", "action") and value]


@pytest.fixture(scope="module")
def task(flower: ServedFlower, worker: str, redis: RedisServer) -> str:
    """A task that Flower has seen from its sending to its end, and whose worker it has asked about itself."""
    uuid = run_task(redis.url())
    flower.until(lambda: flower.tasks().get(uuid, {}).get("state") == "SUCCESS", PATIENCE, "the task's end is seen")
    flower.until(lambda: "stats" in flower.ask("/api/workers").json.get(worker, {}), PATIENCE, "the worker is known")
    return uuid


def test_every_link_and_asset_answers_under_the_prefix_and_none_is_elsewhere(
    flower: ServedFlower, worker: str, task: str
) -> None:
    todo = ["/", "/workers", "/tasks", "/broker", f"/task/{task}", f"/worker/{worker}"]
    seen: set[str] = set()
    assets = 0
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = flower.ask(path)
        assert answer.status == 200, path
        if not answer.headers["Content-Type"].startswith("text/html"):
            continue
        for tag, link in Links(answer.text).found:
            if link.startswith("#"):
                continue
            if urlsplit(link).netloc:
                # A reader may follow these; the page itself needs nothing from outside.
                assert tag == "a", (path, link)
                continue
            assert link.startswith("/flower/"), (path, link)
            assets += tag != "a"
            todo.append(link.removeprefix("/flower"))
    assert assets > 50
    assert any(path.startswith("/task/") and task not in path for path in seen), "the parent's page was not reached"


def test_style_sheets_and_scripts_load_nothing_from_outside(flower: ServedFlower) -> None:
    for name in ("bootstrap.min", "datatables-1.13.4.min", "flower"):
        text = flower.ask(f"/static/css/{name}.css").text
        addresses = re.findall(r"url\(['\"]?([^'\")]+)", text)
        assert not [address for address in addresses if not address.startswith("data:")], name
        assert "@import" not in text
    assert not re.findall(r"['\"]https?://", flower.ask("/static/js/flower.js").text)


def test_the_style_sheet_ends_with_ours_also_when_it_is_read_in_parts(flower: ServedFlower) -> None:
    whole = flower.ask("/static/css/flower.css")
    assert whole.body.endswith(STYLE)
    assert int(whole.headers["Content-Length"]) == len(whole.body)
    part = flower.ask("/static/css/flower.css", headers={"Range": f"bytes=-{len(STYLE)}"})
    assert (part.status, part.body) == (206, STYLE)
    # Browsers keep a file for as long as its address stays the same.
    address = next(link for _, link in Links(flower.ask("/").text).found if "css/flower.css?v=" in link)
    assert address.partition("?v=")[2] in whole.headers["Etag"]


@pytest.mark.parametrize("path", ["/", "/nowhere", "/healthcheck", "/api/workers", "/metrics", "/static/js/flower.js"])
@pytest.mark.parametrize("login", [LOGIN, None], ids=["with-login", "without"])
def test_no_answer_can_be_framed_or_made_to_load_from_elsewhere(
    flower: ServedFlower, login: str | None, path: str
) -> None:
    headers = flower.ask(path, login=login).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_what_the_pages_scripts_ask_for_answers_under_the_prefix(flower: ServedFlower, worker: str, task: str) -> None:
    rows = flower.ask("/tasks/datatable", "POST", body=TABLE, headers=FORM).json["data"]
    assert task in [row["uuid"] for row in rows]
    assert worker in [row["hostname"] for row in flower.ask("/workers?json=1").json["data"]]
    assert worker in flower.ask(f"/api/workers?workername={worker}&refresh=1").json
    assert "shop.add" in flower.ask("/api/task/types").json["task-types"]
    assert flower.ask(f"/api/task/info/{task}").json["result"] == "6"
    assert flower.ask(f"/api/task/result/{task}").json["result"] == 6


@pytest.mark.parametrize("path", ["/", "/flower"])
def test_the_root_leads_to_the_prefix(flower: ServedFlower, path: str) -> None:
    answer = flower.ask(path, prefix="")
    assert (answer.status, answer.headers["Location"]) == (302, "/flower/")


def test_an_unknown_page_is_a_404_and_no_traceback(flower: ServedFlower) -> None:
    assert flower.ask("/nowhere").status == 404
    assert flower.ask("/login").status == 404
    assert flower.ask("/workers", prefix="").status == 404
    for login in (LOGIN, READ_ONLY_LOGIN):
        assert {flower.ask(path, login=login).status for path in ("/worker/nobody@shop", "/task/none")} == {404}
    assert "Traceback" not in flower.process.log()


def test_no_password_is_logged_or_shown(flower: ServedFlower, worker: str, task: str) -> None:
    secret = [REDIS_PASSWORD, quote(REDIS_PASSWORD, safe=""), PASSWORD, basic(LOGIN).removeprefix("Basic ")]
    pages = ["/", "/broker", f"/worker/{worker}", "/api/workers?refresh=1", f"/task/{task}", "/metrics"]
    shown = [flower.ask(page).text for page in pages]
    for text in [*shown, flower.process.log()]:
        assert not [word for word in secret if word in text]
    assert flower.settings.broker_url.mask() in shown[1]


def test_flower_sends_tasks_and_stops_workers_on_request(flower: ServedFlower, redis: RedisServer, worker: str) -> None:
    sent = flower.ask("/api/task/send-task/shop.add", "POST", body='{"args": [20, 22]}').json["task-id"]
    result = f"/api/task/result/{sent}"
    flower.until(lambda: flower.ask(result).json.get("result") == 42, PATIENCE, "the task's result is there")
    assert flower.ask("/api/worker/shutdown/nobody@shop", "POST").status == 404
    leaver = start_worker(flower.world, redis.url(), "leaver@shop")
    # Flower asks a new worker about itself of its own accord; until then it does not let it be stopped.
    flower.until(lambda: "leaver@shop" in flower.ask("/api/workers").json, PATIENCE, "the new worker is known")
    leaver.signal(signal.SIGSTOP)
    answer = flower.ask("/api/worker/queue/add-consumer/leaver@shop?queue=more", "POST")
    assert (answer.status, answer.text) == (
        403,
        "Failed to add 'more' consumer to 'leaver@shop' worker: "
        "it has not answered, and may do it later: with a solo pool when its task has ended",
    )
    leaver.signal(signal.SIGCONT)
    answer = flower.ask("/api/worker/shutdown/leaver@shop", "POST")
    assert (answer.status, answer.json) == (200, {"message": "Shutting down!"})
    assert leaver.wait(PATIENCE) == 0
    assert flower.ask(f"/api/workers?workername={worker}&refresh=1").json[worker]["stats"]


# ── health ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "end"),
    [(RedisServer.kill, RedisServer.start), (RedisServer.freeze, RedisServer.thaw)],
    ids=["killed", "frozen"],
)
def test_health_follows_redis_and_the_heartbeat_does_not(
    fault: Callable[[RedisServer], None],
    end: Callable[[RedisServer], None],
    world: World,
    serve: Callable[..., ServedFlower],
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis, FLOWER_URL_PREFIX="/flower").ready()
    served.wait_for_task(send_events(redis.url())[0])
    fault(redis)
    served.until(lambda: served.health() == 503, PATIENCE, "the health check says that Redis is away")
    answer = served.ask("/healthcheck", login=None)
    assert answer.text.count("\n") == 1
    assert "127.0.0.1" not in answer.text
    assert served.ask("/api/queues/length").status == 503
    away = time.time()
    served.until(lambda: served.heartbeat.stat().st_mtime > away, PATIENCE, "the heart beats on")
    assert served.health() == 503
    end(redis)
    served.until(lambda: served.health() == 200, PATIENCE, "the health check says that Redis is back")
    served.until(lambda: send_events(redis.url())[0] in served.tasks(), PATIENCE, "events arrive again")
    assert "Traceback" not in served.process.log()


def test_flower_that_starts_before_redis_is_unhealthy_until_redis_is_there(
    world: World, serve: Callable[..., ServedFlower]
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    redis.kill()
    served = serve(redis)
    served.until(lambda: served.health() == 503, PATIENCE, "Flower answers without Redis")
    served.until(served.heartbeat.exists, PATIENCE, "the heart beats without Redis")
    redis.start()
    served.ready().wait_for_task(send_events(redis.url())[0])


def test_the_health_check_is_cheap(world: World, serve: Callable[..., ServedFlower]) -> None:
    """It goes over a connection that is there already."""
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis).ready()
    client = redis.client()
    before = client.info("stats")["total_connections_received"]
    for _ in range(200):
        served.healthy()
    # Flower's timers may open some of their own meanwhile.
    assert client.info("stats")["total_connections_received"] - before < 100


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - as Flower does
        ("127.0.0.1", "127.0.0.1"),
        ("::", "[::1]"),
        ("[::1]", "[::1]"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_flower_asks_itself_where_it_listens(address: str, host: str) -> None:
    assert host_to_ask(address) == host


def test_the_heart_does_not_beat_when_nothing_answers() -> None:
    beats: list[int] = []

    async def beat() -> None:
        await Pulse(f"http://127.0.0.1:{free_port()}/healthcheck", lambda: beats.append(1)).beat()

    asyncio.run(beat())
    assert not beats


# ── what Flower keeps ──────────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_survive_a_kill(world: World, serve: Callable[..., ServedFlower]) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis).ready()
    start_worker(world, redis.url(), "maker@shop")
    uuid = run_task(redis.url())
    served.until(lambda: served.tasks().get(uuid, {}).get("worker"), PATIENCE, "its worker is known")
    # What is saved with a later event was saved with all before it.
    served.wait_for_save(send_events(redis.url())[0])
    served.process.signal(signal.SIGKILL)
    assert served.process.wait(PATIENCE) == -signal.SIGKILL
    again = serve(redis).ready()
    assert again.tasks()[uuid]["worker"] == "maker@shop"
    # A task with a parent, read back, can be shown and saved once more.
    assert again.ask(f"/task/{uuid}").status == 200
    again.wait_for_save(send_events(redis.url())[0])
    assert uuid.encode() in again.database.read_bytes()
    assert again.database.stat().st_mode & 0o077 == 0
    assert "Traceback" not in again.process.log()


def kill_while_saving(served: ServedFlower, broker: str) -> None:
    """Kill Flower when a part of a save is written; the part is where it would have left it."""
    partial = served.database.with_name("flower.db.new")

    def hold() -> bool:
        with suppress(FileExistsError):
            # Who writes to a pipe stands still once it is full.
            os.mkfifo(partial)
        return partial.is_fifo()

    served.until(hold, PATIENCE, "there is a pipe in place of the file that it writes")
    with open(os.open(partial, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        send_events(broker)
        assert select.select([pipe], [], [], PATIENCE)[0], served.process.tail()
        served.process.signal(signal.SIGKILL)
        served.process.wait(PATIENCE)
        written = pipe.read()
    partial.unlink()
    partial.write_bytes(written)


def test_a_kill_in_the_middle_of_saving_loses_nothing_that_was_saved(
    world: World, serve: Callable[..., ServedFlower]
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis).ready()
    first = send_events(redis.url(), 1000)[0]
    served.wait_for_task(first)
    served.wait_for_save(first)
    kill_while_saving(served, redis.url())
    again = serve(redis).ready()
    assert first in again.tasks()
    assert "cannot be read" not in again.process.log()


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps({"events": 1}), pickle.dumps(("x" * 999, {}))[:500]],
    ids=["empty", "garbage", "something-else", "torn"],
)
def test_an_unreadable_file_is_moved_aside(
    content: bytes, redis: RedisServer, world: World, serve: Callable[..., ServedFlower]
) -> None:
    directory = world.directory / "flower"
    directory.mkdir()
    (directory / "flower.db").write_bytes(content)
    served = serve(redis).ready()
    assert served.tasks() == {}
    assert (directory / "flower.db.unreadable").read_bytes() == content
    assert served.process.count("cannot be read") == 1
    assert "Traceback" not in served.process.log()


def test_a_database_that_cannot_be_written_is_said_at_once(world: World, serve: Callable[..., ServedFlower]) -> None:
    (world.directory / "flower" / "flower.db.new").mkdir(parents=True)
    served = serve(None)
    said = served.refused()
    assert said.startswith(f"{served.database}: Flower cannot write there (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["redis-there", "redis-frozen"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_flower_leaves_promptly_and_saves(
    number: signal.Signals, frozen: bool, world: World, serve: Callable[..., ServedFlower]
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis, FLOWER_STATE_SAVE_INTERVAL="3600").ready()
    uuid = send_events(redis.url())[0]
    served.wait_for_task(uuid)
    assert not served.database.exists()
    if frozen:
        redis.freeze()
        served.until(lambda: served.health() == 503, PATIENCE, "the health check says that Redis is away")
    served.process.signal(number)
    assert served.process.wait(PATIENCE) == 0
    assert uuid.encode() in served.database.read_bytes()
    for noise in ("Traceback", "Task was destroyed", "never awaited"):
        assert noise not in served.process.log()


def test_limits_hold_for_new_tasks_and_for_those_read_back(world: World, serve: Callable[..., ServedFlower]) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis, FLOWER_MAX_TASKS="200").ready()
    last = ""
    for index in range(3):
        last = send_events(redis.url(), 100, f"ghost{index}@shop")[-1]
        served.wait_for_task(last)
    assert len(served.tasks()) == 200
    assert len(served.ask("/api/workers?status=1").json) == 3
    served.process.terminate()
    assert served.process.wait(PATIENCE) == 0
    fewer = serve(redis, FLOWER_MAX_TASKS="100", FLOWER_MAX_WORKERS="2").ready()
    assert len(fewer.tasks()) == 100
    assert last in fewer.tasks()
    assert fewer.ask("/api/workers?status=1").json.keys() == {"ghost1@shop", "ghost2@shop"}


class SlowLoop:
    """An event loop that does not get round to anything."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[..., None], Any]] = []

    def add_callback(self, callback: Callable[..., None], argument: Any) -> None:
        self.waiting.append((callback, argument))


def test_events_that_flower_cannot_follow_are_left_to_redis() -> None:
    loop = SlowLoop()
    events = Events(Celery("t", set_as_current=False), loop)
    event = {"type": "worker-heartbeat", "hostname": "w@h", "timestamp": 1.0, "local_received": 1.0, "clock": 1}
    full = threading.Event()

    def receive() -> None:
        for _ in range(MAX_WAITING_EVENTS):
            events.on_event(event)
        full.set()
        events.on_event(event)

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    assert full.wait(PATIENCE)
    assert len(loop.waiting) == MAX_WAITING_EVENTS
    take, argument = loop.waiting[0]
    # It waits for this, and for nothing else.
    assert receiver.is_alive()
    take(argument)
    receiver.join(PATIENCE)
    assert not receiver.is_alive()


def test_a_worker_that_is_gone_disappears_everywhere(world: World, serve: Callable[..., ServedFlower]) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis, FLOWER_PURGE_OFFLINE_WORKERS="3").ready()
    goner = start_worker(world, redis.url(), "goner@shop")
    run_task(redis.url())
    places = ["/workers?json=1", "/workers", "/metrics", "/api/workers", "/api/workers?status=1"]

    def shown_on() -> list[str]:
        return [place for place in places if "goner@shop" in served.ask(place).text]

    served.until(lambda: shown_on() == places, PATIENCE, "the worker is shown everywhere")
    goner.signal(signal.SIGKILL)
    served.until(lambda: not shown_on(), PATIENCE, "the worker is shown nowhere")


def test_a_process_that_sent_tasks_is_forgotten(world: World, serve: Callable[..., ServedFlower]) -> None:
    # Each has counters of its own, and a command line tool is another process every time.
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis, FLOWER_PURGE_OFFLINE_WORKERS="3").ready()
    sent = count(1)

    def counted() -> bool:
        # Again and again: it may be forgotten before a busy machine looks.
        send_sent_event(redis.url(), "gen7@laptop")
        next(sent)
        return "gen7@laptop" in served.ask("/metrics").text

    served.until(counted, PATIENCE, "the sender is counted")
    served.until(lambda: "gen7@laptop" not in served.ask("/metrics").text, PATIENCE, "the sender is forgotten")
    assert len(served.tasks()) == next(sent) - 1


# ── the broker ─────────────────────────────────────────────────────────────────────────────────────────────────────

MASTER = "the-master"


def over_tcp(world: World) -> dict[str, str]:
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD).url(7)}


def over_a_socket(world: World) -> dict[str, str]:
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD).socket_url(7), "REDIS_PASSWORD": REDIS_PASSWORD}


def over_tls(world: World) -> dict[str, str]:
    require_tls(world.directory)
    certificates = make_certificates(world.directory / "certificates")
    return {"CELERY_BROKER_URL": world.redis(REDIS_PASSWORD, certificates=certificates).url(7)}


def over_sentinels(world: World, certificates: Path | None = None) -> dict[str, str]:
    master = world.redis(REDIS_PASSWORD, certificates=certificates)
    watch = [
        f"sentinel monitor {MASTER} 127.0.0.1 {master.port} 1",
        f'sentinel auth-pass {MASTER} "{REDIS_PASSWORD}"',
    ]
    sentinel = world.redis("", lines=watch, sentinel=True, certificates=certificates)
    options = f"?ssl_ca_certs={certificates / 'ca.crt'}&ssl_min_version=TLSv1.3" if certificates else ""
    # The second is down. Were it the first, redis-py would try it for 3 s with each new connection (redis-py 8.1).
    urls = [f"sentinel://127.0.0.1:{port}/7{options}" for port in (sentinel.port, free_port())]
    return {
        "CELERY_BROKER_URL": ";".join(urls),
        "CELERY_SENTINEL_MASTER": MASTER,
        "REDIS_PASSWORD": REDIS_PASSWORD,
    }


def over_sentinels_with_tls(world: World) -> dict[str, str]:
    require_tls(world.directory)
    return over_sentinels(world, make_certificates(world.directory / "certificates"))


@pytest.mark.parametrize("way", [over_tcp, over_a_socket, over_tls, over_sentinels, over_sentinels_with_tls])
def test_queue_lengths_and_events_come_over_every_kind_of_url(
    way: Callable[[World], dict[str, str]], world: World, serve: Callable[..., ServedFlower]
) -> None:
    served = serve(None, **way(world), CELERY_RESULT_BACKEND="redis://127.0.0.1:1/0").ready()
    with connect(served.settings.broker_url, served.settings) as client:
        for key in lists_of("celery"):
            client.rpush(key, "a message", "another")
    assert served.ask("/api/queues/length").json == {"active_queues": [{"name": "celery", "messages": 8}]}
    page = served.ask("/broker").text
    assert re.search(r"<td>celery</td>\s*<td[^>]*>8</td>", page)
    assert html.unescape(page).count(served.settings.broker_url.mask()) == 1
    assert quote(REDIS_PASSWORD, safe="") not in page + served.process.log()


def test_a_queue_that_no_worker_takes_from_is_shown(world: World, serve: Callable[..., ServedFlower]) -> None:
    redis = world.redis(REDIS_PASSWORD)
    served = serve(redis).ready()
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="forgotten", priority=6)
    lengths = {queue["name"]: queue["messages"] for queue in served.ask("/api/queues/length").json["active_queues"]}
    assert lengths == {"celery": 0, "forgotten": 1}


def test_the_brokers_page_tells_how_many_nodes_take_from_a_queue(
    flower: ServedFlower, redis: RedisServer, task: str
) -> None:
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="left")

    def cells(queue: str) -> list[str]:
        row = flower.ask("/broker").text.partition(f"<td>{queue}</td>")[2].partition("</tr>")[0]
        return re.findall(r"<td[^>]*>([^<]*)</td>", row)

    # Messages, ready, consumers; the two between and after are a dash in an element of its own.
    try:
        flower.until(lambda: cells("celery") == ["0", "0", "1"], PATIENCE, "one node takes from celery")
    except GaveUp as error:
        known = {path: flower.ask(path).text for path in ("/api/workers", "/api/workers?status=1")}
        said = [line for line in flower.process.log().splitlines() if not re.search(" (DEBUG|INFO) ", line)]
        raise AssertionError(f"{cells('celery')} {known} {said}") from error
    assert cells("left") == ["1", "1", "0"]


def lose_a_message(redis: RedisServer) -> None:
    """Leave a message as a worker does that died long ago: unacknowledged and expired."""
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="orphans")
    client = redis.client()
    message = client.rpop("orphans")
    assert isinstance(message, str)
    client.hset("unacked", "tag", json.dumps([json.loads(message), "", "orphans"]))
    client.zadd("unacked_index", {"tag": 1})


def test_flower_leaves_the_unacknowledged_messages_of_workers_alone(
    world: World, serve: Callable[..., ServedFlower]
) -> None:
    redis = world.redis(REDIS_PASSWORD)
    client = redis.client()
    served = serve(redis).ready()
    lose_a_message(redis)
    for _ in range(2):
        assert served.ask("/api/workers?refresh=1").status == 200
    assert (client.hlen("unacked"), client.llen("orphans")) == (1, 0)
    # And this is what a consumer with the usual names does, in its first second or later.
    with Celery("stock", broker=redis.url(), set_as_current=False) as app:

        def given_back() -> bool:
            app.control.inspect(timeout=1).stats()
            return (client.hlen("unacked"), client.llen("orphans")) == (0, 1)

        served.until(given_back, PATIENCE, "it is back in its queue")
