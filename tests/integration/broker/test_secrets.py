"""No secret in what the stack says, writes, answers or shows: a word that is nowhere else is planted in each of them.

A stack is made to talk: at its most talkative log level, asked whatever it can be asked, with a Redis that accepts its
passwords no more, and one that dies.
"""

import hashlib
import json
import re
import shlex
from base64 import b64encode
from contextlib import suppress
from html import unescape
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery.worker.control import Panel

from config import load
from config.settings import SECRETS
from services.control import task_commands  # noqa: F401 - registers commands
from tests.support.harness import Harness
from tests.support.ports import free_port
from tests.support.processes import command_line
from tests.support.redis.server import RedisServer
from tests.support.redis.urls import MASTER, start_sentinel
from tests.support.served_flower import Answer, basic
from tests.support.waiting import TIMEOUT_SECONDS

ADD = "services.tasks.arithmetic.add"
# What URLs, shells, JSON, HTML or log lines write in ways of their own stands between two words that none of them does.
AWKWARD = "@$:/#%?&;'\" é"
# A secret of somebody's own, which tasks read.
OWN = "SHOP_TOKEN"
# Each URL logs in as a user of its own.
USERS = {"CELERY_BROKER_URL": "carrier", "CELERY_RESULT_BACKEND": "keeper"}
# A node needs libraries for this one that Stalk does not have.
ELSEWHERE = {"objgraph"}
COMMANDS = (
    "-m config show",
    "-m services status",
    "-m services schedule",
    "-m services dead-letters --all",
    "-m services call services.tasks.nowhere",
    f"-m services call {ADD} --args [4,3] --wait 1",
    "-m celery -A services.app report",
    "-m celery -A services.app status",
    "-m celery -A services.app inspect stats --json",
    "-m celery -A services.app inspect conf",
    "-m celery -A services.app graph workers",
)
# Those that say more where Redis is not as it should be.
TROUBLED = ("-m services status", f"-m services call {ADD} --args [4,3] --wait 1", "-m celery -A services.app status")
# What tests themselves write with a secret in it: what a server and a sentinel run on, and files with one secret each.
MEANT_TO = ("redis.conf", "secret")
# Somebody's own program, which shows all that libraries log, and how each error came about.
PRODUCER = f"""
import logging, traceback
logging.basicConfig(level=logging.DEBUG)
from services.app import app
print(app, app.connection(), app.backend, app.conf.humanize(with_defaults=True), app.settings)
for attempt in (
    lambda: app.send_task({ADD!r}, (1, 2), retry=False, ignore_result=True),
    lambda: app.backend.client.ping(),
    lambda: app.redbeat_redis.ping(),
):
    try:
        print(attempt())
    except Exception:
        traceback.print_exc()
"""
PAGES = ("/", "/broker", "/tasks", "/metrics", "/api/workers?refresh=1", "/api/workers", "/api/tasks",
         "/api/queues/length", "/api/task/types", "/healthcheck", "/nowhere")  # fmt: skip


def word(name: str) -> str:
    """What betrays a secret, whole or in part."""
    return f"Canary{name.replace('_', '')}"


def planted(name: str) -> str:
    """The password in a secret."""
    return f"{word(name)}{AWKWARD}{word(name)}"


# Who logs in to Flower with each of its secrets.
LOGINS = {"FLOWER_BASIC_AUTH": "admin", "FLOWER_READ_ONLY_AUTH": "guest"}


def login(name: str = "FLOWER_BASIC_AUTH") -> str:
    return f"{LOGINS[name]}:{planted(name)}"


# Flower's logins as browsers send them, besides all of them as they are.
SIGNS = (*map(word, (*SECRETS, OWN)), *(b64encode(login(name).encode()).decode() for name in LOGINS))


def secrets(form: str, server: RedisServer) -> dict[str, str]:
    """Each secret with its canary; both URLs are of this form, and name this server."""
    place, ending = f"127.0.0.1:{server.port}", "/"
    if form == "redis+socket":
        place, ending = str(server.socket_path), "?virtual_host="
    values = {"REDIS_PASSWORD": planted("REDIS_PASSWORD"), **{name: login(name) for name in LOGINS}}
    values["CELERY_SENTINEL_PASSWORD"] = planted("CELERY_SENTINEL_PASSWORD")
    for database, (name, user) in enumerate(USERS.items()):
        values[name] = f"{form}://{user}:{quote(planted(name), safe='')}@{place}{ending}{database}"
    assert values.keys() == set(SECRETS), "plant a canary in each secret that there is"
    return values


def opened(name: str) -> str:
    """What makes Redis accept the password in this URL, and no other."""
    return f"on resetpass #{hashlib.sha256(planted(name).encode()).hexdigest()} ~* &* +@all"


class Talk:
    """A stack, and all that it writes."""

    def __init__(self, harness: Harness, form: str) -> None:
        self.harness = harness
        users = [f"user {user} {opened(name)}" for name, user in USERS.items()]
        redis = harness.redis(planted("REDIS_PASSWORD"), users)
        password = planted("CELERY_SENTINEL_PASSWORD")
        self.sentinel = start_sentinel(harness, redis, password) if form == "sentinel" else None
        settings = secrets(form, self.sentinel or redis)
        if self.sentinel:
            settings = in_files(settings, harness) | {"CELERY_SENTINEL_MASTER": MASTER}
        urls = load(settings).broker_url, load(settings).result_url
        assert [url.password for url in urls] == [planted(name) for name in USERS]
        self.stack = harness.stack(redis, **settings, **{OWN: planted(OWN)}, LOG_LEVEL="debug")
        self.worker, self.beat = self.stack.worker(), self.stack.beat()
        self.events = self.stack.celery("events --dump")
        self.port, database = free_port(), harness.path("flower.db")
        flower = f"-m services.launch flower --address 127.0.0.1 --port {self.port} --database {database}"
        self.flower = self.stack.python(flower)
        # What node and Flower have answered; commands have written it down.
        self.answers: dict[str, str] = {}

    def run(self, *commands: str) -> None:
        """Run commands, whether they succeed or not, and somebody's own program."""
        begun = [self.stack.python(command) for command in (*commands, f"-c {shlex.quote(PRODUCER)}")]
        for command in begun:
            command.exits(TIMEOUT_SECONDS)

    def ask_node(self) -> None:
        """Keep what a node answers to every question that there is."""
        more: dict[str, Any] = {"conf": {"with_defaults": True}, "query_task": {"ids": ["none"]}}
        questions = {name for name, about in Panel.meta.items() if about.type == "inspect"}
        for name in sorted(questions - ELSEWHERE):
            options = {"reply": True, "timeout": TIMEOUT_SECONDS, "limit": 1}
            answers = self.stack.client.control.broadcast(name, more.get(name), **options)
            assert answers, f"nobody has answered {name}"
            self.answers[f"inspect {name}"] = json.dumps(answers)

    def page(self, path: str) -> str:
        """What Flower shows; nothing while it does not listen."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request("GET", path, headers={"Authorization": basic(login())})
            answer = Answer(connection.getresponse())
            return str(answer.headers) + unescape(answer.text)
        except OSError:
            return ""
        finally:
            connection.close()

    def find(self, pattern: str, path: str) -> list[str]:
        """Wait until a page of Flower has this."""
        return self.harness.wait_until(
            lambda: re.findall(pattern, self.page(path)), TIMEOUT_SECONDS, f"{pattern} there"
        )

    def see_flower(self) -> None:
        """Keep pages of every kind."""
        for part in ("stats", "conf"):
            self.find(f'"{part}"', "/api/workers")
        (node,) = self.find(r'"(node0@[^"]+)": {', "/api/workers")
        self.works()
        tasks = self.find(r'"uuid": "([^"]+)"', "/api/tasks")
        for path in (*PAGES, f"/worker/{node}", *(f"/task/{task}" for task in tasks)):
            self.answers[f"page {path}"] = self.page(path)

    def trouble(self) -> None:
        """Let Redis refuse everybody, then die, and its sentinel with it, and come back as it was."""
        for user in USERS.values():
            self.stack.redis.ask("ACL", "SETUSER", user, "resetpass", ">another")
            self.stack.redis.ask("CLIENT", "KILL", "USER", user)
        for node in (self.worker, self.beat, self.flower):
            node.says("invalid username-password pair|AuthenticationError")
        assert self.stack.worker().exits(TIMEOUT_SECONDS) == 3
        self.run(*TROUBLED)
        self.stack.redis.kill()
        if self.sentinel:
            self.sentinel.stop()
        self.run(*TROUBLED)
        if self.sentinel:
            self.sentinel.start()
        self.stack.redis.start()

    def works(self) -> None:
        """Wait for a task's result."""
        assert self.stack.send(ADD, 4, 3).get(timeout=TIMEOUT_SECONDS) == 7

    def places(self) -> dict[str, str]:
        """Everything that may hold no secret: answers, files that somebody wrote, and what `ps` shows."""
        files = [path for path in self.harness.directory.rglob("*") if path.is_file() and path.name not in MEANT_TO]
        written = {}
        for path in files:
            # A temporary one of Redis may be gone.
            with suppress(FileNotFoundError):
                written[str(path)] = path.read_text(errors="replace")
        processes = {f"process {path.name}": command_line(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
        return self.answers | written | processes


def in_files(settings: dict[str, str], harness: Harness) -> dict[str, str]:
    """The same, each secret in a file of its own."""
    given = dict.fromkeys(settings, "")
    for name, value in settings.items():
        path = harness.path(name) / "secret"
        path.parent.mkdir()
        path.write_text(value)
        given[f"{name}_FILE"] = str(path)
    return given


def shown(text: str) -> list[str]:
    """Where a secret stands in a text, with what stands around it."""
    return re.findall(rf".{{0,60}}(?:{'|'.join(map(re.escape, SIGNS))}).{{0,20}}", text)


@pytest.mark.parametrize(
    "form",
    [pytest.param("redis", marks=pytest.mark.slow), "redis+socket", pytest.param("sentinel", marks=pytest.mark.slow)],
)
def test_no_secret_is_shown_anywhere(harness: Harness, form: str) -> None:
    talk = Talk(harness, form)
    talk.worker.ready()
    talk.works()
    for task in ("probe.fail", "nowhere"):
        assert talk.stack.send(task, "once").get(timeout=TIMEOUT_SECONDS, propagate=False)

    talk.run(*COMMANDS)
    talk.ask_node()
    talk.see_flower()
    before = talk.places()
    talk.trouble()
    talk.works()
    for node in (talk.worker, talk.beat, talk.flower, talk.events):
        node.process.terminate()
        node.exits(TIMEOUT_SECONDS)

    found = {place: where for place, text in (before | talk.places()).items() if (where := shown(text))}
    assert not found


# Each says it in words of its own.
@pytest.mark.each_redis
def test_a_server_that_repeats_what_it_does_not_know_repeats_no_password(harness: Harness) -> None:
    # redis-py logs in with HELLO (redis-py 8.1).
    stack = harness.stack(harness.redis(planted("REDIS_PASSWORD"), ['rename-command HELLO ""']))

    worker, producer = stack.worker(), stack.python(f"-c {shlex.quote(PRODUCER)}")

    assert (worker.exits(TIMEOUT_SECONDS), producer.exits(TIMEOUT_SECONDS)) == (3, 0)
    assert worker.process.count("it does not know HELLO, with which clients log in") == 1
    assert producer.process.count("ResponseError: unknown command .HELLO.$") == 3
    assert not shown(worker.process.log() + producer.process.log())
