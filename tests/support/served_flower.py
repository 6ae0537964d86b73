"""Flower in a process of its own, with workers and events for it to show."""

import base64
import http.client
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from celery import Celery
from celery.events import EventDispatcher

from config import load
from tests.support.fork_server import LIBRARIES_ONLY
from tests.support.harness import Harness, forget_results
from tests.support.ports import free_port
from tests.support.processes import Process
from tests.support.redis.server import RedisServer

# Generous, for a busy machine: Flower checks most things once a second.
TIMEOUT = 120
# With every character that a URL, an option parser or a comparison of text could get wrong.
REDIS_PASSWORD = "r:e,d/i@s%20"
PASSWORD = "a,b:ü ✓"
LOGIN = f"admin:{PASSWORD}"
READ_ONLY_LOGIN = f"guest:{PASSWORD}"
# Addresses of the loopback network stand for different machines.
PROXY, IN_PROXIES_NETWORK, STRANGER = "127.0.0.7", "127.7.7.7", "127.0.0.8"
LOGGED_IN_BY_PROXY = {"Remote-User": "alice@example.com"}

# The request of the tasks page.
TABLE = "draw=1&start=0&length=10&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name&search[value]="
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PAGES = ["/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers", "/static/js/flower.js"]

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
    heartbeat = pathlib.Path(given["heartbeat"]).touch
    serve(app, settings, port=given["port"], database=given["database"], heartbeat=heartbeat)
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
    """The answer to one request."""

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
        self, harness: Harness, directory: Path, settings: dict[str, str], surroundings: dict[str, str], port: int
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.harness, self.port = harness, port
        self.database, self.heartbeat = directory / "flower.db", directory / "heartbeat"
        self.settings = load(settings)
        self.prefix = f"/{self.settings.flower.url_prefix}".rstrip("/")
        given = {"settings": settings, "port": port, "database": str(self.database), "heartbeat": str(self.heartbeat)}
        environment = {"PYTHONPATH": str(harness.checkout.path), "GIVEN": json.dumps(given), **surroundings}
        (directory / "served.py").write_text(RUNNER)
        self.process = harness.python("flower", "-m served", environment, directory)

    def until(self, check: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait until `check()` is true and return its value; fail at once when Flower has ended."""

        def check_alive() -> Any:
            assert self.process.alive, f"Flower ended before {what}\n{self.process.tail()}"
            return check()

        return self.harness.wait_until(check_alive, seconds, what)

    def ready(self) -> Self:
        self.healthy()
        return self

    def refused(self) -> str:
        """Wait until it has refused to start; its log."""
        assert self.process.wait(TIMEOUT) == 2, self.process.tail()
        return self.process.log()

    def health(self) -> int:
        """The status of the health check; 0 where nothing answers."""
        with suppress(OSError):
            return self.ask("/healthcheck", login=None).status
        return 0

    def healthy(self, method: str = "GET", host: str = "127.0.0.1") -> Answer:
        """Wait until the health check is OK without a login, and return its answer; a busy Redis may answer late."""

        def ask() -> Answer | None:
            with suppress(OSError):
                answer = self.ask("/healthcheck", method, login=None, host=host)
                return answer if answer.status == 200 else None
            return None

        found: Answer = self.until(ask, TIMEOUT, "the health check says that all is well")
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
        """Send one request under the prefix, from the address `source` if it is given."""
        sent = {**({"Authorization": basic(login)} if login is not None else {}), **(headers or {})}
        comes_from = (source, 0) if source else None
        with closing(
            http.client.HTTPConnection(host, self.port, timeout=TIMEOUT, source_address=comes_from)
        ) as connection:
            connection.request(method, (self.prefix if prefix is None else prefix) + path, body, sent)
            return Answer(connection.getresponse())

    def tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("/api/tasks").json
        return found

    def wait_for_task(self, uuid: str) -> None:
        self.until(lambda: uuid in self.tasks(), TIMEOUT, f"task {uuid} is known")

    def wait_for_save(self, uuid: str) -> None:
        self.until(
            lambda: self.database.exists() and uuid.encode() in self.database.read_bytes(),
            TIMEOUT,
            f"task {uuid} is saved",
        )


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def start_flower(
    harness: Harness,
    redis: RedisServer | None,
    directory: Path,
    settings: dict[str, str],
    surroundings: dict[str, str] | None = None,
    *,
    port: int = 0,
) -> ServedFlower:
    urls = {"CELERY_BROKER_URL": redis.url(), "CELERY_RESULT_BACKEND": redis.url()} if redis else {}
    given = {**urls, "FLOWER_BASIC_AUTH": LOGIN, "FLOWER_STATE_SAVE_INTERVAL": "1", **settings}
    return ServedFlower(harness, directory, given, surroundings or {}, port or free_port())


def start_worker(harness: Harness, broker: str, name: str) -> Process:
    """Start a stock Celery worker and wait until it is ready."""
    directory = harness.path("shop")
    directory.mkdir()
    (directory / "shop.py").write_text(TASKS)
    command = f"-m celery -A shop worker -P solo -n {name} -l INFO"
    environment = {"PATH": os.environ["PATH"], "BROKER": broker, "RESULTS": broker}
    worker = harness.python("worker", command, environment, directory, LIBRARIES_ONLY)
    harness.wait_until(lambda: worker.count(r" ready\.$"), TIMEOUT, f"{name} is ready")
    return worker


@contextmanager
def dispatcher(broker: str, sender: str) -> Iterator[EventDispatcher]:
    """A dispatcher of events that come from `sender`."""
    with (
        Celery("sender", broker=broker, set_as_current=False) as app,
        app.connection() as connection,
        app.events.Dispatcher(connection, hostname=sender) as found,
    ):
        yield found


def send_events(broker: str, count: int = 1, sender: str = "ghost@shop", *, ended: bool = True) -> list[str]:
    """Publish the events of `count` tasks that succeed, or never end; their ids."""
    ids = [str(uuid4()) for _ in range(count)]
    with dispatcher(broker, sender) as events:
        events.send("worker-heartbeat", freq=1, active=0, processed=0, loadavg=[0, 0, 0], sw_ident="ghost")
        for uuid in ids:
            about = {"args": "()", "kwargs": "{}", "root_id": uuid, "parent_id": None, "retries": 0}
            events.send("task-received", uuid=uuid, name="shop.ghost", eta=None, expires=None, **about)
            events.send("task-started", uuid=uuid)
            if ended:
                events.send("task-succeeded", uuid=uuid, result="None", runtime=0.01)
        # Flower runs in UTC here: by its heartbeat a sender east of it would be online for hours (celery 5.7).
        if not ended:
            events.send("worker-offline", freq=1)
    return ids


def send_sent_event(broker: str, sender: str) -> None:
    """Publish the event of a task that `sender` has sent and that no worker takes."""
    with dispatcher(broker, sender) as events:
        events.send("task-sent", uuid=str(uuid4()), name="shop.ghost", args="()", kwargs="{}", retries=0)


def run_task(broker: str) -> str:
    """Run a chain of two tasks; the id of the second, which has a parent."""
    with Celery("client", broker=broker, backend=broker, set_as_current=False) as app:
        first = app.signature("shop.add", (1, 2))
        result = (first | app.signature("shop.add", (3,))).apply_async()
        assert result.get(timeout=TIMEOUT) == 6
        forget_results(app)
        return str(result.id)
