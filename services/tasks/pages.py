"""Pages of the web: work that waits for the network, and tries again when the network lets it down."""

import hashlib
import string
import time
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import TypedDict
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)

# A server that needs longer is overloaded: better to free the worker and come back than to sit and wait.
DEFAULT_TIMEOUT = 10.0

# No HTML page comes near. Without a bound, a server that never stops sending decides how long the task runs.
MAX_BYTES = 32 * 1024 * 1024

# Large enough that the loop costs nothing beside the hash, small enough to notice the deadline in time.
CHUNK_BYTES = 64 * 1024

# As many as urllib itself allows: a longer way is a loop.
MAX_REDIRECTS = 10

# Waits of up to 2, 4, 8, 16 and 32 seconds: about a minute, which is what a restart or a failover takes. A
# page that is away for longer is for the caller to decide about.
MAX_RETRIES = 5
BACKOFF_SECONDS = 2

# Above the longest wait of today's retries, so it changes nothing until somebody raises MAX_RETRIES: then the
# waits stop doubling here, and a page that came back is noticed within a minute.
MAX_BACKOFF_SECONDS = 60

REDIRECTS = frozenset({301, 302, 303, 307, 308})
TOO_MANY_REQUESTS = 429


class PageError(Exception):
    """The page cannot be had, and asking again would not help."""


class PageUnavailableError(Exception):
    """The page cannot be had at the moment: no connection, a broken one, status 429 or 5xx."""


class Page(TypedDict):
    """What `fetch` says about a page; `url` is where the redirects ended, `seconds` the time it all took."""

    url: str
    status: int
    bytes: int
    sha256: str
    seconds: float


@shared_task(
    autoretry_for=(PageUnavailableError,),
    max_retries=MAX_RETRIES,
    retry_backoff=BACKOFF_SECONDS,
    retry_backoff_max=MAX_BACKOFF_SECONDS,
    # Tasks that failed together would otherwise come back together, and bring the server down again.
    retry_jitter=True,
)
def fetch(url: str, timeout: float = DEFAULT_TIMEOUT) -> Page:
    """Fetch an http or https URL and describe what came: status, length, SHA-256.

    `timeout` is in seconds and for the whole fetch, redirects included. One wait for the server may overrun
    it, so a fetch takes at most about twice as long. The URL may point anywhere, into your own network too:
    check those that strangers give you before you send the task.

    Idempotent as far as the server is: GET is all it is asked. Raises ValueError for a URL that is not http
    or https (or redirects to one that is not), PageError for a status outside 2xx, a body above MAX_BYTES or
    more than MAX_REDIRECTS redirects, and, after MAX_RETRIES retries, PageUnavailableError.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, not {timeout}")
    began = time.monotonic()
    try:
        with _open(_checked(url), began + timeout) as response:
            _check_status(response)
            size, sha256 = _read(response, began + timeout)
    except InvalidURL as error:
        raise ValueError(str(error)) from error
    except (OSError, HTTPException) as error:
        raise PageUnavailableError(f"{url}: {error!r}") from error
    page = Page(
        url=response.url,
        status=response.status,
        bytes=size,
        sha256=sha256,
        seconds=round(time.monotonic() - began, 3),
    )
    logger.info("%s: %d, %d bytes in %.3f s", page["url"], page["status"], page["bytes"], page["seconds"])
    return page


def _checked(url: str) -> str:
    """Return the URL if it is one we may open. Raises ValueError if not."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an http or https URL: {url!r}")
    if "@" in parts.netloc:
        # Without the URL: arguments, results and log lines are no place for a password.
        raise ValueError("a URL with a user name or a password in it is not fetched")
    # Reading the port is what checks it.
    _ = parts.port
    return url


def _open(url: str, deadline: float) -> HTTPResponse:
    """Return the response that the redirects from `url` end at, its body unread."""
    for _ in range(MAX_REDIRECTS + 1):
        response: HTTPResponse = _opener().open(url, timeout=_remaining(deadline))
        location = response.getheader("Location")
        if response.status not in REDIRECTS or location is None:
            return response
        response.close()
        # Header bytes reach us decoded as ISO 8859-1; quote what a request line cannot carry.
        url = _checked(urljoin(url, quote(location, safe=string.punctuation, encoding="iso-8859-1")))
    raise PageError(f"more than {MAX_REDIRECTS} redirects, the last to {url}")


def _opener() -> OpenerDirector:
    """Return an opener for http and https and nothing else.

    urllib's usual one also opens files and FTP, takes proxies from the environment, and reads the body of a
    redirect however long it is.
    """
    opener = OpenerDirector()
    opener.add_handler(HTTPHandler())
    opener.add_handler(HTTPSHandler())
    return opener


def _remaining(deadline: float) -> float:
    """Return the seconds left. Raises TimeoutError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _check_status(response: HTTPResponse) -> None:
    """Raise PageUnavailableError for a status that may pass, PageError for one that will not."""
    status = response.status
    if status == TOO_MANY_REQUESTS or status >= 500:
        raise PageUnavailableError(f"{response.url}: status {status}")
    if not 200 <= status < 300:
        raise PageError(f"{response.url}: status {status}")


def _read(response: HTTPResponse, deadline: float) -> tuple[int, str]:
    """Read the body and return its length in bytes and its SHA-256, without ever holding it whole."""
    size, digest = 0, hashlib.sha256()
    # read1 returns what has come; read would wait for a full chunk, however slowly it drips in.
    while chunk := response.read1(CHUNK_BYTES):
        size += len(chunk)
        if size > MAX_BYTES:
            raise PageError(f"{response.url}: more than {MAX_BYTES} bytes")
        digest.update(chunk)
        _remaining(deadline)
    # A connection that breaks off looks like the end of the body: http.client leaves the difference here.
    if response.length:
        raise PageUnavailableError(f"{response.url}: {response.length} bytes are missing")
    return size, digest.hexdigest()
