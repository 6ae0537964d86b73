"""The examples, as real processes: against the stack in both runtimes, and against a Redis that is away."""

import json
import re
import shlex
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from functools import cache
from subprocess import CompletedProcess
from typing import Any
from uuid import uuid4

import pytest

from tests.stack.containers.deployment import ROOT, Stack
from tests.stack.documents.connecting import PAGE, changed, local_stack, on_host, printed, python, typed, urls
from tests.support.harness import Harness
from tests.support.ports import free_port
from tests.support.redis.proxy import Proxy
from tests.support.redis.server import RedisServer
from tests.support.waiting import wait_until

# The blocks of docs/connect.md that start a web application.
WEB = ("run-fastapi", "run-django")
# Importing a web framework and Celery takes 2 s on an idle machine.
START_SECONDS = 300
# Milliseconds for a sum and seconds for a chain, on a machine that may be busy with much else.
TASK_SECONDS = 300
# Some five seconds of one core: long enough to be looked at several times.
ROUNDS = 8_000_000
# Some minutes: it is ended as soon as it was looked at.
LONG_ROUNDS = 30 * ROUNDS
# As docs/connect.md has it.
AWAY_SECONDS = 6
# As many as FastAPI has threads.
THREADS = 40
# One is enough, unless the machine is busy with much else just then.
ATTEMPTS = 5


class Site:
    """A web application that runs."""

    def __init__(self, port: int) -> None:
        self._port = port

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), START_SECONDS).close()
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

    def ask_until_answered(
        self, method: str, path: str, busy: Sequence[int] = (), **body: Any
    ) -> tuple[int, Any, Message]:
        """Like `ask`, once more when Redis was away for a moment (503), or with a status that is `busy`."""
        return wait_until(
            lambda: None if (answer := self.ask(method, path, **body))[0] in (503, *busy) else answer,
            TASK_SECONDS,
            f"{method} {path} is answered",
        )

    def ask_at_once(self, *requests: tuple[str, str]) -> list[int]:
        """The status of each answer to requests that are all made at the same time."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.ask(*request)[0], requests))


def start_site(harness: Harness, block: str, environment: dict[str, str]) -> Site:
    """Start a web application with the command of a block."""
    port = free_port()
    process = harness.process(block, shlex.split(typed(block, {"8000": str(port)})), environment, ROOT)
    site = Site(port)
    harness.wait_until(lambda: site.listens() or not process.alive, START_SECONDS, f"{block} listens")
    assert process.alive, process.tail()
    return site


Serve = Callable[[str, dict[str, str]], Site]


@pytest.fixture
def serve(harness: Harness) -> Serve:
    """Starts a web application with the command of a block."""
    return lambda block, environment: start_site(harness, block, environment)


# The containers are those of all tests with containers, which are slow enough; what differs is the way to Redis.
DOCKER = pytest.param("docker", marks=[pytest.mark.xdist_group("containers"), pytest.mark.slow])


@pytest.fixture(scope="module", params=[DOCKER, "local"])
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


@pytest.fixture(scope="module")
def site_of(reached: dict[str, str], shared_harness: Harness) -> Callable[[str], Site]:
    """The web application of a block in front of the stack, started when it is first asked for."""
    return cache(lambda block: start_site(shared_harness, block, reached))


def python_until_answered(reached: dict[str, str], *arguments: str) -> CompletedProcess[str]:
    """Python beside the stack, once more when Redis was away for a moment."""
    return wait_until(
        lambda: None if "could not be " in (done := python(reached, *arguments)).stderr else done,
        TASK_SECONDS,
        f"Redis answers {arguments}",
    )


def test_plain_python_shows_progress_and_the_result(reached: dict[str, str]) -> None:
    (command,) = shlex.split(typed("run-plain", {}), comments=True)[1:]
    done = python_until_answered(reached, command, str(2 * ROUNDS))
    assert done.returncode == 0, done.stdout + done.stderr
    sent, *progress, result = done.stdout.splitlines()
    assert re.fullmatch(r"Sent [0-9a-f-]{36}\.", sent)
    shares = [int(line.removesuffix("%")) for line in progress if line.endswith("%")]
    assert any(0 < share < 100 for share in shares)
    assert shares == sorted(shares)
    assert re.fullmatch(r"SUCCESS: [0-9a-f]{64}", result)


def test_plain_python_gives_up_waiting_and_the_task_goes_on(reached: dict[str, str]) -> None:
    done = python_until_answered(reached, "examples/plain.py", str(4 * ROUNDS), "1")
    assert done.returncode == 3, done.stdout + done.stderr
    task = done.stdout.split()[1].rstrip(".")
    program = f"from producer import Task, wait; print(wait(Task({task!r}), {TASK_SECONDS}).state)"
    assert python(reached, "-c", program).stdout == "SUCCESS\n"


def test_the_lines_of_the_page_do_what_they_say(reached: dict[str, str]) -> None:
    program = printed("lines", {})
    # A busy machine may need longer for the sum, and to look at a chain that would have ended meanwhile.
    for old, new in {"4, 3), 5)": f"4, 3), {TASK_SECONDS})", "10_000_000": str(LONG_ROUNDS)}.items():
        assert program.count(old) == 1, program
        program = program.replace(old, new)
    end = "from producer import sender; sender.control.revoke(chain.id, terminate=True)\n"
    done = python_until_answered(reached, "-c", f"{program}print(total.value, chain.state)\n{end}")
    assert done.stdout in ("7 PENDING\n", "7 PROGRESS\n"), done.stdout + done.stderr


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_gets_the_result_when_it_is_there_in_time(site_of: Callable[[str], Site], block: str) -> None:
    # Beside much else five seconds may be too short, and then the answer is 202, which another test is about.
    status, body, _ = site_of(block).ask_until_answered("POST", "/sums", busy=[202], x=4, y=3)
    assert (status, body["state"], body["value"]) == (200, "SUCCESS", 7)


@pytest.mark.parametrize("block", WEB)
def test_a_web_application_shows_progress(site_of: Callable[[str], Site], block: str) -> None:
    site = site_of(block)
    status, body, headers = site.ask_until_answered("POST", "/chains", seed="seed", rounds=2 * ROUNDS)
    assert (status, headers["Location"]) == (202, f"/tasks/{body['id']}")
    answers: list[tuple[int, Any]] = []

    def ended() -> bool:
        status, body, _ = site.ask_until_answered("GET", headers["Location"])
        answers.append((status, body))
        return bool(status != 202)

    wait_until(ended, TASK_SECONDS, "the chain ends", lambda: str(answers), look=0.2)
    shares = [body["value"]["done"] / body["value"]["total"] for _, body in answers if body["state"] == "PROGRESS"]
    assert any(0 < share < 1 for share in shares), answers
    assert answers[-1][0] == 200, answers[-1]
    assert re.fullmatch(r"[0-9a-f]{64}", answers[-1][1]["value"])


@pytest.mark.parametrize("block", WEB)
def test_a_web_application_tells_why_a_task_failed(site_of: Callable[[str], Site], block: str) -> None:
    site = site_of(block)
    _, _, headers = site.ask_until_answered("POST", "/chains", seed="seed", rounds=-1)
    status, body, _ = site.ask_until_answered("GET", headers["Location"], busy=[202])
    assert (status, body["state"]) == (500, "FAILURE")
    assert body["value"].startswith("ValueError: rounds must be from 1 to ")


# Below, a Redis without a worker: what a web application does is the same in both runtimes.


@pytest.fixture
def broker(harness: Harness) -> RedisServer:
    # No test needs its data after its end, and a disk that holds up a write makes a producer believe that it is away.
    return harness.redis(lines=["appendonly no"])


@pytest.fixture
def alone(broker: RedisServer) -> dict[str, str]:
    """The environment of a program whose tasks nobody runs."""
    return on_host(CELERY_BROKER_URL=broker.url(0), CELERY_RESULT_BACKEND=broker.url(1))


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_that_gets_no_result_in_time_gets_the_id(
    broker: RedisServer, alone: dict[str, str], serve: Serve, block: str
) -> None:
    status, body, headers = serve(block, alone).ask("POST", "/sums", x=4, y=3)
    assert (status, body["state"], headers["Location"]) == (202, "PENDING", f"/tasks/{body['id']}")
    assert [message["headers"]["id"] for message in queued(broker)] == [body["id"]]


@pytest.mark.parametrize("block", WEB)
def test_a_web_request_is_answered_while_redis_is_away(
    broker: RedisServer, alone: dict[str, str], serve: Serve, block: str
) -> None:
    site = serve(block, alone)
    assert site.ask("POST", "/reports")[0] == 204
    broker.freeze()
    # Redis still stands when the answers are there.
    answers = site.ask_at_once(("POST", "/reports"), ("POST", "/reports"), ("GET", f"/tasks/{uuid4()}"))
    assert answers == [503] * 3
    broker.thaw()
    assert site.ask("POST", "/reports")[0] == 204
    # What was sent while Redis stood still was sent once and once more, and it may have got both.
    sent = Counter(message["headers"]["id"] for message in queued(broker))
    assert max(sent.values()) <= 2, sent
    broker.kill()
    status, body, headers = site.ask("POST", "/reports")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert body["error"].startswith("the task could not be sent: ")
    # Nobody listens, which is known at once: nothing was waited for.
    assert "refused" in body["error"].lower()
    broker.start()
    # The connections that the site has kept are dead, and nobody notices.
    assert site.ask("POST", "/reports")[0] == 204


def all_wait_at_once(site: Site, proxy: Proxy) -> bool:
    """Whether, of as many requests as FastAPI has threads, each has a connection while none has its answer."""
    proxy.cut()
    wait_until(lambda: not proxy.connections(), TASK_SECONDS, "no connection is left of those before")
    with ThreadPoolExecutor(1) as background:
        answers = background.submit(site.ask_at_once, *[("POST", "/reports")] * THREADS)
        wait_until(lambda: proxy.connections() >= THREADS or answers.done(), TASK_SECONDS, "all have a connection")
        at_once = not answers.done()
        assert answers.result() == [503] * THREADS
    return at_once


def test_no_request_waits_for_another_one_while_redis_stands_still(
    broker: RedisServer, alone: dict[str, str], serve: Serve
) -> None:
    proxy = Proxy(broker.port)
    try:
        url = broker.url(0).replace(f":{broker.port}/", f":{proxy.port}/")
        site = serve("run-fastapi", alone | {"CELERY_BROKER_URL": url})
        broker.freeze()
        # On a busy machine the first may have given up when the last one comes.
        assert any(all_wait_at_once(site, proxy) for _ in range(ATTEMPTS))
    finally:
        proxy.close()


def test_redis_is_waited_for_as_long_as_the_page_says(alone: dict[str, str]) -> None:
    # To send, to connect, to send again.
    program = (
        "from producer import SOCKET_SECONDS, sender;"
        "assert sender.conf.broker_transport_options['socket_timeout'] == SOCKET_SECONDS;"
        "assert sender.conf.broker_transport_options['socket_connect_timeout'] == SOCKET_SECONDS;"
        "print(SOCKET_SECONDS * (2 + sender.conf.task_publish_retry_policy['max_retries']))"
    )
    assert python(alone, "-c", program).stdout == f"{AWAY_SECONDS}\n"
    assert f"after {AWAY_SECONDS} seconds at most" in PAGE.read_text()


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
