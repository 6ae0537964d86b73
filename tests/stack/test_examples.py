"""The examples, as real processes: against the stack in both runtimes, and against a Redis that is away."""

from __future__ import annotations

import json
import re
import shlex
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest

from tests.stack.connecting import changed, local_stack, on_host, printed, python, typed, urls
from tests.stack.handle import ROOT, Stack
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.world import World

# The blocks of docs/connect.md that start a web application.
WEB = ("run-fastapi", "run-django")
# Importing a web framework and Celery takes 2 s on an idle machine.
START_SECONDS = 40
# Milliseconds for a sum and seconds for a chain, on a machine that may be busy with something else.
TASK_SECONDS = 60
# Some five seconds of one core: long enough to be looked at several times.
ROUNDS = 8_000_000
# As docs/connect.md has it, and what a busy machine adds.
AWAY_SECONDS, SLACK_SECONDS = 6, 4


class Site:
    """A web application that runs."""

    def __init__(self, port: int) -> None:
        self._port = port

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), 5).close()
        except OSError:
            return False
        return True

    def ask(self, method: str, path: str, **body: Any) -> tuple[int, Any, Message]:
        """Status, JSON and headers of an answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            json.dumps(body).encode() if method == "POST" else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=TASK_SECONDS) as response:
                return response.status, json.loads(response.read() or "null"), response.headers
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), error.headers

    def timed(self, method: str, path: str, **body: Any) -> tuple[int, float]:
        """Status of an answer, and how long it took."""
        started = monotonic()
        status, _, _ = self.ask(method, path, **body)
        return status, monotonic() - started


Serve = Callable[[str, dict[str, str]], Site]


@pytest.fixture
def serve(world: World) -> Serve:
    """Starts a web application with the command of a block."""

    def start(block: str, environment: dict[str, str]) -> Site:
        port = free_port()
        process = world.process(block, shlex.split(typed(block, {"8000": str(port)})), environment, ROOT)
        site = Site(port)
        world.wait_until(lambda: site.listens() or not process.alive, START_SECONDS, f"{block} listens")
        assert process.alive, process.tail()
        return site

    return start


@pytest.fixture(scope="module", params=["docker", "local"])
def reached(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment of a program on this host that reaches a stack as docs/connect.md says."""
    if request.param == "local":
        with local_stack() as local:
            local.make("up")
            yield on_host(**urls("socket-urls", local.directory, local.environment(), {}))
        return
    stack: Stack = request.getfixturevalue("first_stack")[0]
    port = str(free_port())
    with changed(stack, printed("host-env", {}), REDIS_PORT=port):
        stack.make("up")
        yield on_host(**urls("host-urls", stack.directory, stack.environment(), {":6379": f":{port}"}))


def test_plain_python_shows_progress_and_the_result(reached: dict[str, str]) -> None:
    (command,) = shlex.split(typed("run-plain", {}), comments=True)[1:]
    done = python(reached, command, str(ROUNDS))
    assert done.returncode == 0, done.stdout + done.stderr
    sent, *progress, result = done.stdout.splitlines()
    assert re.fullmatch(r"Sent [0-9a-f-]{36}\.", sent)
    shares = [int(line.removesuffix("%")) for line in progress if line.endswith("%")]
    assert any(0 < share < 100 for share in shares)
    assert shares == sorted(shares)
    assert re.fullmatch(r"SUCCESS: [0-9a-f]{64}", result)


def test_plain_python_gives_up_waiting_and_the_task_goes_on(reached: dict[str, str]) -> None:
    started = monotonic()
    done = python(reached, "examples/plain.py", str(ROUNDS), "1")
    assert done.returncode == 3, done.stdout + done.stderr
    task = done.stdout.split()[1].rstrip(".")
    program = f"from producer import Task, wait; print(wait(Task({task!r}), {TASK_SECONDS}).state)"
    assert python(reached, "-c", program).stdout == "SUCCESS\n"
    assert monotonic() - started > 1


def test_the_lines_of_the_page_do_what_they_say(reached: dict[str, str]) -> None:
    program = printed("lines", {}).replace("10_000_000", str(ROUNDS // 4))
    done = python(reached, "-c", program + "print(total.value, chain.state)\n")
    assert done.stdout in ("7 PENDING\n", "7 PROGRESS\n"), done.stdout + done.stderr


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_gets_the_result_when_it_is_there_in_time(
    reached: dict[str, str], serve: Serve, block: str
) -> None:
    status, body, _ = serve(block, reached).ask("POST", "/sums", x=4, y=3)
    assert (status, body["state"], body["value"]) == (200, "SUCCESS", 7)


@pytest.mark.parametrize("block", WEB)
def test_a_web_application_shows_progress(reached: dict[str, str], serve: Serve, block: str) -> None:
    site = serve(block, reached)
    status, body, headers = site.ask("POST", "/chains", seed="seed", rounds=ROUNDS)
    assert (status, headers["Location"]) == (202, f"/tasks/{body['id']}")
    seen: list[tuple[int, Any]] = []

    def ended() -> bool:
        status, body, _ = site.ask("GET", headers["Location"])
        seen.append((status, body))
        return bool(status != 202)

    wait_until(ended, TASK_SECONDS, "the chain ends", lambda: str(seen), look=0.2)
    shares = [body["value"]["done"] / body["value"]["total"] for _, body in seen if body["state"] == "PROGRESS"]
    assert any(0 < share < 1 for share in shares), seen
    assert seen[-1][0] == 200, seen[-1]
    assert re.fullmatch(r"[0-9a-f]{64}", seen[-1][1]["value"])


@pytest.mark.parametrize("block", WEB)
def test_a_web_application_tells_why_a_task_failed(reached: dict[str, str], serve: Serve, block: str) -> None:
    site = serve(block, reached)
    _, _, headers = site.ask("POST", "/chains", seed="seed", rounds=-1)
    wait_until(lambda: site.ask("GET", headers["Location"])[0] != 202, TASK_SECONDS, "the task ends")
    status, body, _ = site.ask("GET", headers["Location"])
    assert (status, body["state"]) == (500, "FAILURE")
    assert body["value"].startswith("ValueError: rounds must be from 1 to ")


# Below, a Redis without a worker: what a web application does is the same in both runtimes.


@pytest.fixture
def broker(world: World) -> RedisServer:
    return world.redis()


@pytest.fixture
def alone(broker: RedisServer) -> dict[str, str]:
    """The environment of a program whose tasks nobody runs."""
    return on_host(CELERY_BROKER_URL=broker.url(0), CELERY_RESULT_BACKEND=broker.url(1))


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_that_gets_no_result_in_time_gets_the_id(
    broker: RedisServer, alone: dict[str, str], serve: Serve, block: str
) -> None:
    started = monotonic()
    status, body, headers = serve(block, alone).ask("POST", "/sums", x=4, y=3)
    assert (status, body["state"], headers["Location"]) == (202, "PENDING", f"/tasks/{body['id']}")
    assert monotonic() - started < START_SECONDS
    assert [message["headers"]["id"] for message in queued(broker)] == [body["id"]]


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_is_answered_while_redis_is_away(
    broker: RedisServer, alone: dict[str, str], serve: Serve, block: str
) -> None:
    site = serve(block, alone)
    assert site.ask("POST", "/reports")[0] == 204
    broker.freeze()
    for request in (("POST", "/reports"), ("POST", "/reports"), ("GET", f"/tasks/{uuid4()}")):
        status, seconds = site.timed(*request)
        assert (status, seconds < AWAY_SECONDS + SLACK_SECONDS) == (503, True), (request, status, seconds)
    broker.thaw()
    assert site.ask("POST", "/reports")[0] == 204
    broker.kill()
    status, body, headers = site.ask("POST", "/reports")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert body["error"].startswith("the task could not be sent: ")
    # Nobody listens, which is known at once.
    assert site.timed("POST", "/reports")[1] < SLACK_SECONDS
    broker.start()
    # The connections that the site has kept are dead, and nobody notices.
    assert site.ask("POST", "/reports")[0] == 204


def test_no_request_waits_for_another_one_while_redis_stands_still(
    broker: RedisServer, alone: dict[str, str], serve: Serve
) -> None:
    site = serve("run-fastapi", alone)
    broker.freeze()
    # As many as FastAPI has threads.
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: site.timed("POST", "/reports"), range(40)))
    assert {status for status, _ in answers} == {503}
    assert max(seconds for _, seconds in answers) < AWAY_SECONDS + SLACK_SECONDS


def test_a_full_redis_is_away_too(broker: RedisServer, alone: dict[str, str], serve: Serve) -> None:
    site = serve("run-fastapi", alone)
    broker.client().config_set("maxmemory", "1")
    status, body, _ = site.ask("POST", "/sums", x=4, y=3)
    assert status == 503
    assert "maxmemory" in body["error"]
    broker.client().config_set("maxmemory", "0")
    assert site.ask("POST", "/reports")[0] == 204


def test_plain_python_says_that_redis_is_away(broker: RedisServer, alone: dict[str, str]) -> None:
    broker.kill()
    done = python(alone, "examples/plain.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("the task could not be sent: ")


def test_a_message_is_json_and_asks_for_no_result_unless_somebody_reads_it(
    broker: RedisServer, alone: dict[str, str]
) -> None:
    sent = python(alone, "-c", "from producer import send; send('one', 1); send('two', keep_result=False, countdown=9)")
    assert sent.returncode == 0, sent.stderr
    two, one = queued(broker)
    assert [message["content-type"] for message in (one, two)] == ["application/json"] * 2
    assert [message["headers"]["ignore_result"] for message in (one, two)] == [False, True]
    assert [bool(message["headers"]["eta"]) for message in (one, two)] == [False, True]


def test_a_producer_listens_to_nothing(broker: RedisServer, alone: dict[str, str]) -> None:
    program = (
        "import redis; from producer import send, sender; send('one');"
        "print(redis.Redis.from_url(sender.conf.broker_url).pubsub_channels())"
    )
    assert python(alone, "-c", program).stdout == "[]\n"
    assert broker.client().smembers("_kombu.binding.celery") == {"celery\x06\x16\x06\x16celery"}


def test_a_queue_that_is_not_listed_is_an_error_and_not_a_new_queue(broker: RedisServer, alone: dict[str, str]) -> None:
    done = python(alone, "-c", "from producer import send; send('one', queue='cellery')")
    assert done.stderr.splitlines()[-1].startswith("celery.exceptions.QueueNotFound: ")
    assert broker.client().keys() == []


def test_a_second_queue_gets_its_own_tasks_only(broker: RedisServer, alone: dict[str, str]) -> None:
    text = (ROOT / "examples" / "producer.py").read_text()
    two = text.replace('QUEUES = ("celery",)', 'QUEUES = ("celery", "io")')
    assert two != text
    done = python(alone, "-c", two + "\nsend('one'); send('two', queue='io')\n")
    assert done.returncode == 0, done.stderr
    assert [message["headers"]["task"] for message in queued(broker)] == ["one"]
    assert [message["headers"]["task"] for message in queued(broker, "io")] == ["two"]


def queued(broker: RedisServer, queue: str = "celery") -> list[Any]:
    """The messages in a queue, newest first."""
    return [json.loads(message) for message in broker.client().lrange(queue, 0, -1)]
