"""Flower in a browser: logging in, reading pages, running and revoking tasks, at a desk and on a phone.

The stack runs as processes, so that these tests run where there is no Docker, too.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from flower.inspector import Inspector
from playwright.sync_api import Browser, Locator, ViewportSize, expect

from config.environment import read_env_file
from tests.stack.processes.deployment import Local
from tests.support.browser import DESKTOP, PHONE, Visitor, chromium, executable, visit
from tests.support.waiting import wait_until

READ_ONLY_LOGIN = "guest:reads-only"
SETTINGS = {
    "FLOWER_READ_ONLY_AUTH": READ_ONLY_LOGIN,
    "CELERY_IMPORTS": "",
    "WORKERS": "2",
    "WORKER_CONCURRENCY": "1",
    # A long task that a failed test leaves behind does not delay the end.
    "WORKER_SOFT_SHUTDOWN": "1",
    "WORKER_STOP_GRACE_PERIOD": "16",
}
# Takes more than six minutes, longer than any test waits.
LONG_CHAIN = 10**9
# Generous, for a busy machine.
TASK_SECONDS = 300

SHOWN_CELLS = """() => [...document.querySelectorAll("#queue-table tr")].map(
    row => [...row.cells].filter(cell => cell.checkVisibility()).map(cell => cell.textContent.trim())
)"""

# Scrolls to each visible control and checks that a tap at its middle and near both ends would hit it.
UNREACHABLE = """scope => {
    const name = e => e ? `<${e.tagName.toLowerCase()} ${e.id} "${(e.innerText || "").slice(0, 30)}">` : "nothing";
    const controls = document.querySelector(scope).querySelectorAll("a[href], button, input, select, th[tabindex]");
    const problems = [], wide = document.documentElement.scrollWidth;
    if (wide > innerWidth) problems.push(`the page is ${wide} pixels wide`);
    for (const control of controls) {
        // A link for keyboards is outside until it has the focus; DataTables sizes columns by a second, flat header.
        if (!control.checkVisibility({visibilityProperty: true})) continue;
        if (control.closest(".skip-link, .dataTables_scrollBody thead, .dataTables_scrollBody tfoot")) continue;
        control.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
        const box = control.getClientRects()[0];
        for (const x of [box.left + 4, box.left + box.width / 2, box.right - 4]) {
            const hit = document.elementFromPoint(x, box.top + box.height / 2);
            if (!control.contains(hit)) problems.push(`${name(control)} is hidden at ${x} by ${name(hit)}`);
        }
    }
    return problems;
}"""


@dataclass
class Site:
    """A stack's Flower, and a browser that can reach nothing else."""

    stack: Local
    browser: Browser
    pictures: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.stack.port}{self.stack.settings['FLOWER_URL_PREFIX']}"

    @property
    def login(self) -> str:
        return read_env_file(self.stack.env_file)["FLOWER_BASIC_AUTH"]

    @cached_property
    def tasks(self) -> dict[str, str]:
        """The ids of a task that succeeded and of one that failed, by state."""
        with self.visit() as user:
            user.go("/")
            sent = {
                "SUCCESS": user.send("words.count_document", "To be, or not to be, that is the question. " * 20),
                "FAILURE": user.send("primes.count_primes", -1),
            }
            for state, task in sent.items():
                user.wait_for(task, state)
            return sent

    @contextmanager
    def visit(self, window: ViewportSize = DESKTOP, login: str = "") -> Iterator["User"]:
        """Open a browser with the login, or `login`. Fails on errors in its console and on requests elsewhere."""
        with visit(self.browser, self.url, login or self.login, self.pictures, window) as visitor:
            yield User(visitor)
            assert visitor.complaints == []
            assert visitor.strangers() == []


class User:
    """A user's actions in Flower."""

    def __init__(self, visitor: Visitor) -> None:
        self.page, self.go, self.follow = visitor.page, visitor.go, visitor.follow
        self._url = visitor.url

    def get(self, path: str) -> Any:
        """An answer of Flower's API; None where there is none."""
        answer = self.page.request.get(self._url + path)
        return answer.json() if answer.ok else None

    def send(self, task: str, *arguments: Any, **options: Any) -> str:
        """Send a task by Flower's API; its id. Flower has no button for that."""
        path = f"{self._url}/api/task/send-task/services.tasks.{task}"
        return str(self.page.request.post(path, data={"args": arguments, **options}).json()["task-id"])

    def wait_for(self, task: str, state: str) -> dict[str, Any]:
        """Wait until a task is in this state; what Flower knows of it."""

        def look() -> dict[str, Any] | None:
            info: dict[str, Any] | None = self.get(f"/api/task/info/{task}")
            return info if info and info["state"] == state else None

        found = wait_until(look, TASK_SECONDS, f"task {task} is in state {state}", lambda: str(self.get("/api/tasks")))
        assert found
        return found

    def known(self, node: str) -> dict[str, Any]:
        """Wait until a node has answered every inspection, so that its page shows all at once; the answers."""

        def look() -> dict[str, Any] | None:
            told: dict[str, Any] = (self.get(f"/api/workers?refresh=1&workername={node}") or {}).get(node, {})
            return told if told.keys() >= {*Inspector.inspect_methods} else None

        found = wait_until(look, TASK_SECONDS, f"{node} has told all of itself", lambda: str(self.get("/api/workers")))
        assert found
        return found

    def runs(self, node: str, task: str) -> bool:
        """Whether a node runs a task, by its last answer."""
        return task in [each["id"] for each in self.known(node)["active"]]

    def open_first_node(self) -> str:
        """Go from the page of workers to a node's; its name."""
        link = self.page.locator(".worker-name-link").first
        node = link.get_attribute("title")
        assert node
        self.known(node)
        self.follow(link)
        expect(self.page.locator("#workername")).to_have_text(node)
        return node

    def field(self, label: str) -> str:
        """A line of a task's page."""
        return self.page.locator(f".detail-row:has(dt:text-is('{label}')) dd").inner_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; skips where there is none, or fails with STALK_REQUIRE_BROWSER=1."""
    if not executable():
        why = "no Chromium on PATH"
        if os.environ.get("STALK_REQUIRE_BROWSER") == "1":
            pytest.fail(f"STALK_REQUIRE_BROWSER=1, and {why}")
        pytest.skip(why)
    with chromium() as browser:
        yield browser


@contextmanager
def served(browser: Browser, prefix: str, pictures: Path) -> Iterator[Site]:
    """The stack in a fresh checkout, with its Flower under `prefix`."""
    # pytest's own directories have long names, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="stalk-") as base:
        stack = Local(Path(base), **SETTINGS, FLOWER_URL_PREFIX=prefix)
        try:
            stack.make("up")
            yield Site(stack, browser, pictures)
        finally:
            stack.make("clean", check=False, YES="1")


@pytest.fixture(scope="module")
def site_under(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Site]]:
    """The site under a prefix, started when it is first asked for."""
    with ExitStack() as opened:

        @cache
        def site(prefix: str) -> Site:
            return opened.enter_context(served(browser, prefix, tmp_path_factory.mktemp("pictures")))

        yield site


# A second stack, for what differs by a prefix alone.
AT_THE_ROOT = pytest.param("", id="at-the-root", marks=pytest.mark.slow)


@pytest.fixture(params=[AT_THE_ROOT, pytest.param("/flower", id="under-a-prefix")])
def site(site_under: Callable[[str], Site], request: pytest.FixtureRequest) -> Site:
    return site_under(request.param)


@pytest.mark.parametrize("login", ["admin:guessed", "root:"], ids=["wrong-password", "wrong-user"])
def test_nobody_gets_in_without_the_password(site: Site, login: str) -> None:
    with visit(site.browser, site.url, login, site.pictures) as visitor:
        answer = visitor.page.goto(f"{site.url}/")
        assert answer
        assert answer.status == 401
        assert visitor.page.inner_text("body") == "Log in with FLOWER_BASIC_AUTH."


def test_the_nodes_are_shown_with_what_they_are(site: Site) -> None:
    with site.visit() as user:
        user.go("/")
        expect(user.page.locator("#workers-online")).to_have_text("2")
        rows = user.page.locator("#workers-table tbody tr")
        nodes = sorted(row.locator("a").first.get_attribute("title") or "" for row in rows.all())
        assert [node.partition("@")[0] for node in nodes] == ["worker1-node0", "worker2-node0"]
        expect(rows.get_by_text("Online")).to_have_count(2)
        user.known(nodes[0])
        user.follow(user.page.get_by_role("link", name=f"Worker {nodes[0]}"))
        expect(user.page.locator("#workername")).to_have_text(nodes[0])
        assert "prefork" in user.page.inner_text("#tab-pool")
        user.page.click("#worker-tab-limits")
        expect(user.page.locator("#tab-limits")).to_contain_text("services.tasks.arithmetic.add")


def test_a_task_that_is_run_is_listed_and_has_its_arguments_and_its_result(site: Site) -> None:
    with site.visit() as user:
        user.go("/")
        task = user.send("arithmetic.add", 4, 3)
        user.wait_for(task, "SUCCESS")
        user.follow(user.page.locator("text=Tasks").first)
        row = user.page.locator(f"tr[id='{task}']")
        expect(row).to_contain_text("SUCCESS")
        expect(row).to_contain_text("services.tasks.arithmetic.add")
        user.follow(row.get_by_role("link", name=task[:8]))
        expect(user.page).to_have_title(f"services.tasks.arithmetic.add {task[:8]} · Flower")
        assert user.field("Arguments") == "[4, 3]"
        assert user.field("Result") == "7"
        assert user.field("Status") == "SUCCESS"
        assert "node" in user.field("Worker")


def test_a_running_task_is_ended_with_a_button(site: Site) -> None:
    with site.visit() as user:
        user.go("/tasks")
        task = user.send("hashes.hash_chain", "stalk", LONG_CHAIN)
        node = user.wait_for(task, "STARTED")["worker"]
        wait_until(lambda: user.runs(node, task), TASK_SECONDS, "the node says that it runs it")
        user.go(f"/task/{task}")
        user.page.click("text=Terminate")
        expect(user.page.locator(".toast-body")).to_contain_text(f"Revoked '{task}'")
        user.wait_for(task, "REVOKED")
        user.go(f"/task/{task}")
        assert user.field("Status") == "REVOKED"
        # The task is revoked as soon as its child is told to end; the child ends after that.
        wait_until(lambda: not user.runs(node, task), TASK_SECONDS, "the node runs it no more")


def test_a_failed_task_is_found_with_its_traceback(site: Site) -> None:
    with site.visit() as user:
        user.go("/tasks")
        task = user.send("arithmetic.add", 4, "three")
        user.wait_for(task, "FAILURE")
        user.page.get_by_role("button", name="Failed").click()
        user.follow(user.page.locator(f"tr[id='{task}']").get_by_role("link", name=task[:8]))
        expect(user.page.locator(".badge")).to_have_text("FAILURE")
        assert user.field("Exception").startswith("TypeError(")
        traceback = user.field("Traceback")
        assert "Traceback (most recent call last)" in traceback
        assert "in add\n    total = x + y" in traceback


@pytest.mark.parametrize("site", ["/flower"], indirect=True)
def test_the_read_only_login_sees_all_of_a_node_and_no_button(site: Site) -> None:
    with site.visit(login=READ_ONLY_LOGIN) as user:
        open_page(user, f"/task/{site.tasks['SUCCESS']}")
        assert user.field("Status") == "SUCCESS"
        open_page(user, "/tasks")
        user.follow(user.page.locator("text=Workers").first)
        for tab in tabs_of_first_node(user):
            tab.click()
            expect(user.page.locator(".tab-pane.active.show")).to_contain_text(re.compile(r"\w"))
            for control in ("button", "textbox", "spinbutton"):
                expect(user.page.locator(".worker-detail-page").get_by_role(control)).to_have_count(0)


@pytest.mark.parametrize("site", ["/flower"], indirect=True)
def test_a_button_that_cannot_do_it_says_why_and_a_pool_has_none_to_restart_it(site: Site) -> None:
    # The browser logs the refusal as an error, so errors in its console are not checked here.
    with visit(site.browser, site.url, site.login, site.pictures) as visitor:
        user = User(visitor)
        open_page(user, "/")
        node = user.open_first_node()
        user.page.click("#worker-group")
        expect(user.page.locator("#worker-shutdown")).to_be_visible()
        expect(user.page.locator("#worker-pool-restart")).to_have_count(1)
        expect(user.page.locator("#worker-pool-restart")).to_be_hidden()
        answer = user.page.request.post(f"{site.url}/api/worker/pool/restart/{node}")
        assert answer.status == 403
        assert "shut the node down ('Shut Down' in Flower" in answer.text()
        user.page.click("#worker-tab-limits")
        row = user.page.locator("#limits-table tr", has_text="services.tasks.arithmetic.add")
        row.get_by_label("Timeout for services.tasks.arithmetic.add").fill("-1")
        row.get_by_role("button", name="Soft").click()
        expect(user.page.locator(".toast-body")).to_contain_text("must be a number of seconds above 0")


def queues(user: User) -> dict[str, dict[str, str]]:
    """The visible columns of each queue on the broker's page."""
    user.go("/broker")
    columns, *rows = user.page.evaluate(SHOWN_CELLS)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def test_a_phone_shows_a_queue_that_grows_and_that_nobody_takes_from(site: Site) -> None:
    with site.visit(PHONE) as user:
        user.go("/")
        user.send("arithmetic.add", 1, 2, queue="forgotten", priority=6)
        shown = wait_until(
            lambda: found if (found := queues(user))["celery"]["Consumers"] == "2" else None,
            TASK_SECONDS,
            "both nodes are known",
        )
        assert shown["celery"] == {"Queue": "celery", "Ready": "0", "Consumers": "2"}
        assert shown["forgotten"] == {"Queue": "forgotten", "Ready": "1", "Consumers": "0"}


def open_page(user: User, path: str) -> None:
    """Open a page and wait for the rows that its script adds."""
    user.go(path)
    table = user.page.locator("#tasks-table, #workers-table")
    if table.count():
        table.locator("tbody a").first.wait_for()


def tabs_of_first_node(user: User) -> list[Locator]:
    """Go from the page of workers to a node's, whose script comes with it; its tabs."""
    user.open_first_node()
    return user.page.locator("[role=tab]").all()


def check(user: User, place: str, scope: str = "body") -> None:
    """Fail when a control on the page cannot be reached."""
    assert not user.page.evaluate(UNREACHABLE, scope), place


# The prefix changes no measure, so one of them is enough at a desk; a phone has less room, and is the one to look at.
@pytest.mark.parametrize(
    ("site", "window"),
    [
        pytest.param("", DESKTOP, id="at-the-root-at-a-desk", marks=pytest.mark.slow),
        pytest.param("", PHONE, id="at-the-root-on-a-phone", marks=pytest.mark.slow),
        pytest.param("/flower", PHONE, id="under-a-prefix-on-a-phone"),
    ],
    indirect=["site"],
)
def test_everything_on_every_page_can_be_reached(site: Site, window: ViewportSize) -> None:
    with site.visit(window) as user:
        for path in ("/", "/tasks", "/broker", *(f"/task/{task}" for task in site.tasks.values())):
            open_page(user, path)
            check(user, path)
        if window is PHONE:
            user.page.click(".navbar-toggler")
            expect(user.page.locator("#primary-navigation")).to_have_class(re.compile(r"\bshow\b"))
            check(user, "the menu")
        user.follow(user.page.locator("text=Workers").first)
        for tab in tabs_of_first_node(user):
            tab.click()
            expect(user.page.locator(".tab-pane.active.show")).to_have_attribute(
                "aria-labelledby", str(tab.get_attribute("id"))
            )
            check(user, tab.inner_text())
        user.page.click("#worker-group")
        expect(user.page.locator("#worker-shutdown")).to_be_visible()
        check(user, "the worker's actions", ".btn-group")


def test_a_phone_shows_the_state_of_a_task_and_the_way_to_it_at_once(site: Site) -> None:
    with site.visit(PHONE) as user:
        open_page(user, "/tasks")
        row = user.page.locator(f"tr[id='{site.tasks['FAILURE']}']")
        for cell in (row.locator(".badge"), row.get_by_role("link", name=site.tasks["FAILURE"][:8])):
            box = cell.bounding_box()
            assert box
            assert box["x"] + box["width"] <= PHONE["width"]


def test_a_desk_shows_which_worker_ran_a_task_at_once(site: Site) -> None:
    with site.visit() as user:
        open_page(user, "/tasks")
        box = user.page.locator(f"tr[id='{site.tasks['SUCCESS']}'] .worker-name-link").bounding_box()
        assert box
        assert box["x"] + box["width"] <= DESKTOP["width"]


def test_no_page_shows_a_password(site: Site) -> None:
    secrets = [site.stack.password(), site.login.partition(":")[2]]
    with site.visit() as user:
        node = wait_until(lambda: next(iter(user.get("/api/workers")), ""), TASK_SECONDS, "a node is known")
        user.known(node)
        for path in ("/", "/broker", f"/task/{site.tasks['SUCCESS']}", f"/worker/{node}", "/api/workers?refresh=1"):
            user.go(path)
            shown = unquote(user.page.content())
            assert not [secret for secret in secrets if secret in shown], path


# Under one prefix only. It runs tasks for some ten seconds, to have something to show.
@pytest.mark.slow
@pytest.mark.parametrize("site", ["/flower"], ids=["under-a-prefix"], indirect=True)
def test_make_pictures_takes_the_pictures_of_the_readme_and_leaves_nothing_running(site: Site) -> None:
    pictures = [site.stack.directory / "docs" / f"flower-{name}.png" for name in ("tasks", "workers")]
    for picture in pictures:
        picture.unlink(missing_ok=True)
    output = site.stack.make("pictures").stdout
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000
        assert f"Wrote docs/{picture.name}" in output
    with site.visit() as user:
        user.go("/")
        expect(user.page.locator("#workers-active")).to_have_text("0")
