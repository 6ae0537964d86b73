"""Chromium, headless and without a way out of this machine: for the browser tests and the README's pictures."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    HttpCredentials,
    Locator,
    Page,
    Request,
    ViewportSize,
    expect,
    sync_playwright,
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No other machine is found: a page that needs something from elsewhere fails.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
# The pages come from this machine and are small; a busy machine takes its time.
WAIT_SECONDS = 120
# What a test expects is on the pages when they are loaded.
expect.set_options(timeout=WAIT_SECONDS * 1000)


def executable() -> str | None:
    """The Chromium on PATH; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium with a new and empty profile, gone afterwards; without a sandbox, because root cannot have one."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=executable(), args=OPTIONS) as found,
    ):
        yield found


@contextmanager
def session(browser: Browser, login: str, window: ViewportSize = DESKTOP) -> Iterator[BrowserContext]:
    """A browser context without cookies, with `login` for HTTP authentication unless it is ""."""
    user, _, password = login.partition(":")
    credentials: HttpCredentials | None = {"username": user, "password": password} if login else None
    with browser.new_context(viewport=window, http_credentials=credentials, color_scheme="light") as context:
        context.set_default_timeout(WAIT_SECONDS * 1000)
        yield context


# Why Chromium aborts requests when a network interface of the host comes or goes, as with any container.
NETWORK_CHANGED = "net::ERR_NETWORK_CHANGED"
# It then goes to an error page, perhaps in the middle of the next try.
GOES_TO_ERROR_PAGE = 'interrupted by another navigation to "chrome-error:'
# As many containers as other tests may start while one page is loaded.
RELOADS = 20


class Visitor:
    """A page, and a record of its requests and of its errors and warnings."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._interrupted = False
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("requestfailed", self._record_failure)
        page.on("console", self._record_message)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _record_failure(self, request: Request) -> None:
        if request.failure == NETWORK_CHANGED:
            self._interrupted = True
            return
        # Leaving a page aborts its requests.
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"{request.url}: {request.failure}")

    def _record_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and NETWORK_CHANGED not in message.text:
            self.complaints.append(f"{message.text} ({message.location['url']})")

    def go(self, path: str) -> None:
        """Open a page under the site's address, again where the host's network has changed meanwhile."""
        self._load(path, lambda: self.page.goto(self.url + path))

    def follow(self, link: Locator) -> None:
        """Click a link to another page; load that page again where the host's network has changed meanwhile."""

        def click() -> None:
            with self.page.expect_navigation():
                link.click()

        self._load(str(link), click, self.page.reload)

    def _load(self, what: str, load: Callable[[], object], again: Callable[[], object] | None = None) -> None:
        for _ in range(RELOADS):
            self._interrupted, complaints = False, len(self.complaints)
            try:
                load()
            except Error as error:
                if NETWORK_CHANGED not in str(error) and GOES_TO_ERROR_PAGE not in str(error):
                    raise
                self._interrupted = True
            if not self._interrupted:
                return
            # Scripts complain of another one that was not loaded.
            del self.complaints[complaints:]
            load = again or load
        raise AssertionError(f"the network has changed {RELOADS} times while {what} was loaded")

    def strangers(self) -> list[str]:
        """Requests to elsewhere than the site's address; data: is part of the page itself."""
        return [url for url in self.asked if not url.startswith((f"{self.url}/", "data:"))]


@contextmanager
def visit(browser: Browser, url: str, login: str, pictures: Path, window: ViewportSize = DESKTOP) -> Iterator[Visitor]:
    """A visitor of the site at `url`; an error inside shows the page's text and where its picture is."""
    with session(browser, login, window) as context:
        visitor = Visitor(context.new_page(), url)
        try:
            yield visitor
        except Exception as error:
            picture = pictures / "failed.png"
            visitor.page.screenshot(path=picture, full_page=True)
            error.add_note(f"{visitor.page.url}, with a picture in {picture}:\n{visitor.page.inner_text('body')}")
            raise
