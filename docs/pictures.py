"""make pictures: Flower with the stack's own tasks, as the README shows it.

Runs the tasks in the stack of this checkout, which has to be up, and writes docs/flower-tasks.png and
docs/flower-workers.png. The names of nodes are in them: `make scale WORKERS=2` in containers, whose names say nothing
about the machine, makes the better picture.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import APIRequestContext, BrowserContext, Page
from playwright.sync_api import Error as BrowserError

import config
from config import Settings, exit_on_mistakes
from stack.errors import CommandError
from tests.support.browser import DESKTOP, chromium, executable, session
from tests.support.waiting import GaveUp, wait_until

DIRECTORY = Path(__file__).parent
TEXTS = ["To be, or not to be", "that is the question", "whether 'tis nobler in the mind to suffer"]
# In the order in which they are sent, each with the state that it ends in.
TASKS: tuple[tuple[str, list[Any], str], ...] = (
    ("arithmetic.add", [4, 3], "SUCCESS"),
    ("primes.count_primes", [30_000_000], "SUCCESS"),
    ("words.count_document", [TEXTS[0]], "SUCCESS"),
    ("arithmetic.add", [4, "three"], "FAILURE"),
    ("hashes.hash_chain", ["stalk", 1_000_000], "SUCCESS"),
    ("words.count_words", [TEXTS], "SUCCESS"),
    # Runs for longer than it takes to look; ended afterwards.
    ("hashes.hash_chain", ["stalk", 1_000_000_000], "STARTED"),
)
TASK_SECONDS = 60
MARGIN = 24


class Flower:
    """Flower's API."""

    def __init__(self, requests: APIRequestContext, url: str) -> None:
        self._requests, self._url = requests, url

    def require(self) -> None:
        """Raise CommandError when the stack is not up."""
        try:
            healthy = self._requests.get(f"{self._url}/healthcheck").ok
        except BrowserError:
            healthy = False
        if not healthy:
            raise CommandError(f"no Flower that works answers at {self._url}: start the stack with 'make up' first")

    def send(self, task: str, arguments: list[Any]) -> str:
        """Send a task; its id."""
        answer = self._requests.post(f"{self._url}/api/task/send-task/services.tasks.{task}", data={"args": arguments})
        return str(answer.json()["task-id"])

    def state(self, task: str) -> str:
        """A task's state; "" while Flower does not know it."""
        answer = self._requests.get(f"{self._url}/api/task/info/{task}")
        return str(answer.json()["state"]) if answer.ok else ""

    def wait_for(self, task: str, state: str, name: str) -> None:
        """Return when a task is in that state. Raises GaveUp."""
        wait_until(lambda: self.state(task) == state, TASK_SECONDS, f"{name} is in state {state}")

    def revoke(self, task: str) -> None:
        """End a task that runs."""
        self._requests.post(f"{self._url}/api/task/revoke/{task}?terminate=true")


def main() -> None:
    """Take both pictures.

    Raises CommandError, ConfigError or GaveUp.
    """
    if not executable():
        raise CommandError("there is no Chromium on PATH: install it (on Debian: apt-get install chromium)")
    settings = config.load()
    url = get_url(settings)
    with chromium() as browser, session(browser, settings.flower.basic_auth.get_secret_value()) as context:
        flower = Flower(context.request, url)
        flower.require()
        with running_tasks(flower):
            take_picture(
                context, f"{url}/tasks", "tasks", lambda page: page.locator("#tasks-table tbody a").first.wait_for()
            )
            take_picture(
                context, f"{url}/", "workers", lambda page: page.get_by_text("Online", exact=True).first.wait_for()
            )


def get_url(settings: Settings) -> str:
    """The URL at which this host reaches Flower."""
    flower = settings.flower
    host = "127.0.0.1" if flower.bind == "0.0.0.0" else flower.bind  # noqa: S104 - compared, not bound
    return f"http://{host}:{flower.port}" + (f"/{flower.url_prefix}" if flower.url_prefix else "")


@contextmanager
def running_tasks(flower: Flower) -> Iterator[None]:
    """Run TASKS until each is in its state; end those that still run afterwards."""
    running: list[str] = []
    try:
        for name, arguments, state in TASKS:
            task = flower.send(name, arguments)
            running += [task] if state == "STARTED" else []
            flower.wait_for(task, state, name)
        yield
    finally:
        for task in running:
            flower.revoke(task)


def take_picture(context: BrowserContext, url: str, name: str, ready: Callable[[Page], None]) -> None:
    """Write docs/flower-NAME.png: the page at `url`, down to the end of its content."""
    page = context.new_page()
    page.goto(url)
    ready(page)
    bottom = page.locator(".page-section > section").last.evaluate("element => element.getBoundingClientRect().bottom")
    path = DIRECTORY / f"flower-{name}.png"
    page.screenshot(
        path=path, full_page=True, clip={"x": 0, "y": 0, "width": DESKTOP["width"], "height": bottom + MARGIN}
    )
    page.close()
    print(f"Wrote {path.relative_to(DIRECTORY.parent)} ({path.stat().st_size // 1024} KB).")


if __name__ == "__main__":
    try:
        with exit_on_mistakes():
            main()
    except (CommandError, GaveUp) as error:
        sys.exit(f"error: {error}")
