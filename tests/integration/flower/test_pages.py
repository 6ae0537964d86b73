"""Flower's pages and API: links, headers, and what they do."""

import re
import signal
from urllib.parse import urlsplit

import pytest
from celery import Celery

from services.flower.server import SECURITY_HEADERS
from tests.support.redis.server import RedisServer
from tests.support.served_flower import FORM, LOGIN, READ_ONLY_LOGIN, TABLE, TIMEOUT, ServedFlower, start_worker

# The last attribute of an element that has an address.
LINK = r"<(\w+)[^>]*\s(?:href|src|action)=[\"']([^\"']+)"


def test_every_link_and_asset_answers_under_the_prefix_and_only_there(
    flower: ServedFlower, worker: str, task: str
) -> None:
    todo = ["/", "/workers", "/tasks", "/broker", f"/task/{task}", f"/worker/{worker}"]
    visited: set[str] = set()
    assets = 0
    while todo:
        path = todo.pop()
        if path in visited:
            continue
        visited.add(path)
        answer = flower.ask(path)
        assert answer.status == 200, path
        if not answer.headers["Content-Type"].startswith("text/html"):
            continue
        for tag, link in re.findall(LINK, answer.text):
            if link.startswith("#"):
                continue
            if urlsplit(link).netloc:
                # Links to follow are fine; the page itself loads nothing from outside.
                assert tag == "a", (path, link)
                continue
            assert link.startswith("/flower/"), (path, link)
            assets += tag != "a"
            todo.append(link.removeprefix("/flower"))
    assert assets > 50
    assert any(path.startswith("/task/") and task not in path for path in visited), "the parent's page was not reached"


def test_style_sheets_and_scripts_load_nothing_from_outside(flower: ServedFlower) -> None:
    for name in ("bootstrap.min", "datatables-1.13.4.min", "flower"):
        text = flower.ask(f"/static/css/{name}.css").text
        addresses = re.findall(r"url\(['\"]?([^'\")]+)", text)
        assert not [address for address in addresses if not address.startswith("data:")], name
        assert "@import" not in text
    assert not re.findall(r"['\"]https?://", flower.ask("/static/js/flower.js").text)


@pytest.mark.parametrize("path", ["/", "/nowhere", "/healthcheck", "/api/workers", "/metrics", "/static/js/flower.js"])
@pytest.mark.parametrize("login", [LOGIN, None], ids=["with-login", "without"])
def test_no_answer_can_be_framed_or_made_to_load_from_elsewhere(
    flower: ServedFlower, login: str | None, path: str
) -> None:
    headers = flower.ask(path, login=login).headers
    assert {name: headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_what_the_pages_scripts_ask_for_answers_under_the_prefix(flower: ServedFlower, worker: str, task: str) -> None:
    for login in (LOGIN, READ_ONLY_LOGIN):
        rows = flower.ask("/tasks/datatable", "POST", login=login, body=TABLE, headers=FORM).json["data"]
        assert task in [row["uuid"] for row in rows]
    assert worker in [row["hostname"] for row in flower.ask("/workers?json=1").json["data"]]
    assert worker in flower.ask(f"/api/workers?workername={worker}&refresh=1").json
    assert "shop.add" in flower.ask("/api/task/types").json["task-types"]
    assert flower.ask(f"/api/task/info/{task}").json["result"] == "6"
    assert flower.ask(f"/api/task/result/{task}").json["result"] == 6


def test_the_root_leads_to_the_prefix_and_an_unknown_page_is_a_404_without_a_traceback(flower: ServedFlower) -> None:
    for path in ("/", "/flower"):
        answer = flower.ask(path, prefix="")
        assert (answer.status, answer.headers["Location"]) == (302, "/flower/")
    assert flower.ask("/nowhere").status == 404
    assert flower.ask("/login").status == 404
    assert {flower.ask(path, prefix="").status for path in ("/workers", "/tasks")} == {404}
    for login in (LOGIN, READ_ONLY_LOGIN):
        assert {flower.ask(path, login=login).status for path in ("/worker/nobody@shop", "/task/none")} == {404}
    assert "Traceback" not in flower.process.log()


def test_flower_sends_tasks_and_stops_workers_on_request(flower: ServedFlower, redis: RedisServer, worker: str) -> None:
    sent = flower.ask("/api/task/send-task/shop.add", "POST", body='{"args": [20, 22]}').json["task-id"]
    result = f"/api/task/result/{sent}"
    flower.until(lambda: flower.ask(result).json.get("result") == 42, TIMEOUT, "the task's result is there")
    assert flower.ask("/api/worker/shutdown/nobody@shop", "POST").status == 404
    leaver = start_worker(flower.harness, redis.url(), "leaver@shop")
    # Flower inspects new workers periodically, and refuses to stop one before that.
    flower.until(lambda: "leaver@shop" in flower.ask("/api/workers").json, TIMEOUT, "the new worker is known")
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
    assert leaver.wait(TIMEOUT) == 0
    assert flower.ask(f"/api/workers?workername={worker}&refresh=1").json[worker]["stats"]


def test_the_brokers_page_counts_the_nodes_of_a_queue(flower: ServedFlower, redis: RedisServer, task: str) -> None:
    with Celery("client", broker=redis.url(), set_as_current=False) as app:
        app.send_task("shop.add", (1, 2), queue="left")

    def cells(queue: str) -> list[str]:
        row = flower.ask("/broker").text.partition(f"<td>{queue}</td>")[2].partition("</tr>")[0]
        return re.findall(r"<td[^>]*>([^<]*)</td>", row)

    # Messages, ready, consumers; the other two columns hold a dash inside another element.
    flower.until(lambda: cells("celery") == ["0", "0", "1"], TIMEOUT, "one node takes from celery")
    assert cells("left") == ["1", "1", "0"]
