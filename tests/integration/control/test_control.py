"""Remote control: a node hears each command, whatever came before it and whoever has stopped waiting for an answer."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from kombu import Exchange, Producer

from services.control.mailbox import Mailbox
from services.delivery.channel import ANSWER_MILLISECONDS
from services.delivery.connection import Connection
from tests.integration.delivery.test_scheduled import start
from tests.support.harness import Harness, Stack
from tests.support.waiting import TIMEOUT_SECONDS
from tests.support.workers import POOLS, wait_running

# Long enough for a question to be sent, and too short for somebody who sleeps.
NO_ANSWER_SECONDS = 0.5
# Nothing else is subscribed to a pattern then.
ALONE = "--without-gossip"
ANSWER_SECONDS = 60
# For what must not happen: a node that has a place takes a task within milliseconds.
STAYS_SECONDS = 1
# Where Redis publishes what is broadcast to nodes: database 0, kombu's exchange for commands.
TOPIC = "/0.celery.pidbox"
ODD_CONTROL = """
from celery.worker.control import inspect_command
from services.delivery import claim

# As if a node that waits for news did not look by itself before every test has given up.
claim.LOOK_SECONDS = 1_000_000

@inspect_command()
def answer_what_no_message_can_hold(state):
    return object()

@inspect_command()
def raise_an_error(state):
    raise ValueError("on purpose")
"""


@pytest.fixture(params=POOLS)
def stack(request: pytest.FixtureRequest, harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A node of its own, with nobody beside it."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "odd_control.py").write_text(ODD_CONTROL)
    stack = harness.stack()
    start(stack, request.param, more=ALONE, CELERY_IMPORTS="probe,odd_control", PYTHONPATH=str(modules))
    wait_listening(stack)
    return stack


def wait_listening(stack: Stack) -> None:
    """Wait until the node hears commands: it says that it is ready a moment before."""
    stack.nodes[0].ready()
    stack.harness.wait_until(stack.redis.client().pubsub_numpat, TIMEOUT_SECONDS, "the node hears commands")


@contextmanager
def asking(stack: Stack) -> Iterator[Mailbox]:
    """Where somebody asks who has this project's transport."""
    with Connection(stack.redis.url()) as connection:
        yield Mailbox("celery", "fanout", connection)


def ask_and_leave(mailbox: Mailbox) -> None:
    """Do what multi_call does before it waits."""
    mailbox._publish("ping", {}, reply_ticket=uuid4().hex)


def assert_hears(stack: Stack, what: str = "the next command") -> None:
    """The node does what it is told next: it takes tasks from one more queue."""
    [node], queue = stack.nodes, uuid4().hex
    stack.client.control.add_consumer(queue)
    started = f"Started consuming from {queue}"
    stack.harness.wait_until(lambda: node.process.count(started), TIMEOUT_SECONDS, f"the node hears {what}")


def test_the_first_task_of_a_queue_starts_as_soon_as_a_node_consumes_from_it(stack: Stack) -> None:
    [node], control = stack.nodes, stack.client.control
    queues = [f"more-{number}" for number in range(3)]
    for queue in queues:
        control.add_consumer(queue)
        node.says(f"Started consuming from {queue}")
        stack.send("probe.mark", queue, queue=queue)
        stack.harness.wait_started(queue)

    # From none at all, and then from another one than before.
    for queue in ("celery", *queues):
        control.cancel_consumer(queue)
        node.says(f"Canceling queue {queue}")
    control.add_consumer("other")
    node.says("Started consuming from other")
    stack.send("probe.mark", "other", queue="other")
    stack.harness.wait_started("other")
    stack.send("probe.mark", "cancelled", queue="celery")
    stack.send("probe.mark", "another", queue="other")
    stack.harness.wait_started("another")
    assert (stack.waiting(), stack.harness.started("cancelled")) == (1, 0)


def test_an_answer_that_nobody_waits_for_is_dropped_in_silence(stack: Stack) -> None:
    [node] = stack.nodes
    node.process.signal(signal.SIGSTOP)
    with asking(stack) as mailbox:
        for _ in range(3):
            assert not mailbox.multi_call("ping", timeout=NO_ANSWER_SECONDS)
    stack.client.control.add_consumer("next")
    node.process.signal(signal.SIGCONT)

    node.says("Started consuming from next")
    assert node.process.count("Traceback| ERROR ") == 0


def test_asking_leaves_nothing_behind_for_ever(stack: Stack) -> None:
    client = stack.redis.client()
    before = set(client.keys("*pidbox*"))
    with asking(stack) as mailbox:
        for _ in range(20):
            assert mailbox.multi_call("ping", limit=1, timeout=ANSWER_SECONDS)
    # Stock Celery asks as well.
    assert stack.client.control.broadcast("ping", reply=True, limit=1, timeout=ANSWER_SECONDS)
    assert set(client.keys("*pidbox*")) == before
    # Nor does an answer to somebody who died.
    with asking(stack) as mailbox:
        ask_and_leave(mailbox)
        answers = mailbox.reply_queue.name
        stack.harness.wait_until(lambda: client.llen(answers), TIMEOUT_SECONDS, "the node answers")
        assert 0 < client.pttl(answers) <= ANSWER_MILLISECONDS
    assert_hears(stack)


def published(text: str) -> Callable[[Stack], object]:
    """What somebody has written himself."""
    return lambda stack: stack.redis.client().publish(TOPIC, text)


def sent(body: Any, **properties: Any) -> Callable[[Stack], object]:
    """What kombu has sent for somebody."""

    def send(stack: Stack) -> None:
        with Connection(stack.redis.url()) as connection:
            exchange = Exchange("celery.pidbox", "fanout", durable=False)
            Producer(connection, exchange).publish(body, declare=[exchange], **properties)

    return send


def envelope(**fields: Any) -> str:
    return json.dumps({"body": "{}", "content-type": "application/json", "content-encoding": "utf-8", **fields})


MISTAKES = {
    "no JSON": published("{"),
    "a list": published("[1]"),
    "a number": published("1"),
    "no properties": published(envelope(headers={})),
    "no tag": published(envelope(headers={}, properties={})),
    "its body is a list": sent([1]),
    "its body is text": sent("ping"),
    "its body cannot be decoded": sent(b"{", content_type="application/json", content_encoding="utf-8"),
    "its body is pickled": sent(b"", content_type="application/x-python-serialize", content_encoding="binary"),
    "no method": sent({}),
    "an unknown method": sent({"method": "unheard_of"}),
    "the method is a number": sent({"method": 1}),
    "its arguments are a list": sent({"method": "ping", "arguments": [1]}),
    "its arguments are wrong": sent({"method": "revoke", "arguments": {"unheard_of": 1}}),
    "its pattern is no pattern": sent({"method": "ping", "pattern": "(", "matcher": "pcre"}),
    "its matcher is unknown": sent({"method": "ping", "pattern": "*", "matcher": "unheard_of"}),
    "nowhere to answer": sent({"method": "ping", "reply_to": {}, "ticket": "a"}),
    "an answer to a number": sent({"method": "ping", "reply_to": 1, "ticket": "a"}),
    "an answer to anywhere": sent(
        {"method": "ping", "reply_to": {"exchange": "unheard-of", "routing_key": "a"}, "ticket": "a"}
    ),
    "its clock is text": sent({"method": "ping"}, headers={"clock": "late"}),
    "raises": sent({"method": "raise_an_error"}),
}


def test_a_node_hears_the_next_command_after_one_that_is_none(stack: Stack) -> None:
    for mistake, make in MISTAKES.items():
        make(stack)
        assert_hears(stack, f"the next command after: {mistake}")
    # Whoever asks is told why there is no answer.
    for command, reason in (("answer_what_no_message_can_hold", "EncodeError"), ("raise_an_error", "on purpose")):
        kind, why = ask(stack, command)
        assert (kind, reason in why) == ("error", True), why
        assert_hears(stack)
    [node] = stack.nodes
    assert node.process.count("Connected to") == 1
    assert node.process.count("consumer: waiting for") == 0, "it has connected again"


def test_a_node_hears_the_next_command_after_an_answer_that_a_full_redis_refused(stack: Stack) -> None:
    [node] = stack.nodes
    client = stack.redis.client()
    node.process.signal(signal.SIGSTOP)
    with asking(stack) as mailbox:
        ask_and_leave(mailbox)
        client.config_set("maxmemory", 1)
        stack.client.control.cancel_consumer("celery")
        node.process.signal(signal.SIGCONT)
        node.says("Canceling queue celery")
        client.config_set("maxmemory", 0)
    assert_hears(stack)


def ask(stack: Stack, command: str, **arguments: Any) -> tuple[str, str]:
    """What the node answers to a command: ok or error, and the sentence."""
    with asking(stack) as mailbox:
        [answer] = mailbox.multi_call(command, arguments, limit=1, timeout=ANSWER_SECONDS)
    [[[kind, sentence]]] = [each.items() for each in answer.values()]
    return kind, sentence


def hold(stack: Stack, *labels: str) -> list[Any]:
    """Tasks that run until they are released; all have started."""
    results = [stack.send("probe.hold", label) for label in labels]
    wait_running(stack, labels)
    return results


def runs_at_once(stack: Stack, count: int) -> None:
    """The node runs so many tasks at the same time; one more waits until they are released."""
    labels = [uuid4().hex for _ in range(count)]
    results = hold(stack, *labels)
    last = stack.send("probe.mark", "last")
    stack.harness.holds_for(stack.waiting, STAYS_SECONDS, "one more task stays in its queue")
    stack.harness.release(*labels)
    for result in [*results, last]:
        result.get(timeout=TIMEOUT_SECONDS)


def knows_of(stack: Stack, running: int) -> None:
    """Wait until the node knows that so many tasks run: it hears of a start after the task has written it down."""
    inspect: Any = stack.client.control.inspect(timeout=ANSWER_SECONDS, limit=1)
    stack.harness.wait_until(
        lambda: [*map(len, (inspect.active() or {}).values())] == [running], TIMEOUT_SECONDS, "it knows of all"
    )


@pytest.mark.parametrize("stack", ["prefork"], indirect=True)
def test_a_prefork_pool_grows_and_shrinks_by_what_runs_nothing_and_keeps_one_process(stack: Stack) -> None:
    assert ask(stack, "pool_grow", n=3) == ("ok", "pool will grow")
    assert ask(stack, "pool_shrink", n=1) == ("ok", "pool will shrink")
    runs_at_once(stack, 3)

    labels = ["first", "second"]
    hold(stack, *labels)
    knows_of(stack, len(labels))
    shrunk = "the pool has shrunk by 1: its other processes run tasks, so try again later"
    assert ask(stack, "pool_shrink", n=2) == ("error", shrunk)
    stack.harness.release(*labels)
    runs_at_once(stack, 2)

    stays = "the pool has 2 process(es), of which one has to stay: shut the node down instead"
    assert ask(stack, "pool_shrink", n=2) == ("error", stays)
    assert ask(stack, "pool_grow", n=999)[0] == "error"
    assert ask(stack, "pool_grow", n=-1) == ("error", "-1 is no number of processes: give 1 or more")
    runs_at_once(stack, 2)


def test_a_node_says_why_it_does_not_do_with_its_pool_what_it_is_told(stack: Stack, request: Any) -> None:
    assert ask(stack, "autoscale", max=4, min=1) == ("error", "this node does not autoscale: set WORKER_AUTOSCALE")
    refused, why = ask(stack, "pool_restart")
    assert refused == "error"
    assert why.startswith("a pool is not restarted under its tasks: shut the node down (")
    if request.node.callspec.params["stack"] != "prefork":
        fixed = "only a prefork pool grows and shrinks: set WORKER_CONCURRENCY or WORKER_PROCESSES"
        assert ask(stack, "pool_grow", n=1) == ask(stack, "pool_shrink", n=1) == ("error", fixed)
    runs_at_once(stack, 1)


@pytest.mark.parametrize("stack", ["solo"], indirect=True)
def test_a_rate_that_would_let_no_task_start_is_refused(stack: Stack) -> None:
    for wrong in ("-1", "-1/m", "NaN", "inf", "5/x", "many", "/m"):
        kind, why = ask(stack, "rate_limit", task_name="probe.mark", rate_limit=wrong)
        must = "must be a number, 0 for no limit, or one with /s, /m or /h behind it"
        assert (kind, why) == ("error", f"the rate limit is {wrong!r}, and {must}")
    for right in ("1000/s", "60000/m", "0", "2.5"):
        kind, _ = ask(stack, "rate_limit", task_name="probe.mark", rate_limit=right)
        assert kind == "ok"
    stack.send("probe.mark", "marked").get(timeout=TIMEOUT_SECONDS)
    assert ask(stack, "rate_limit", task_name="unheard.of", rate_limit="1") == ("error", "unknown task")


def test_an_autoscaling_node_takes_another_range_and_no_other_size(harness: Harness) -> None:
    stack = harness.stack()
    start(stack, "prefork", more=f"--autoscale=2,1 {ALONE}")
    wait_listening(stack)
    autoscales = "this node autoscales: change its autoscale range instead"
    assert ask(stack, "pool_grow", n=1) == ask(stack, "pool_shrink", n=1) == ("error", autoscales)
    assert ask(stack, "autoscale", max=1, min=2) == ("error", "max=1 min=2 is no range of 1 to 1000 processes")
    assert ask(stack, "autoscale", max=1, min=0)[0] == "error"
    assert ask(stack, "autoscale", max=3, min=1) == ("ok", "autoscale now max=3 min=1")
    runs_at_once(stack, 3)
