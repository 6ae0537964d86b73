"""Authentication of Flower's users: a login that may do everything, a read-only one, and proxies that log users in."""

import base64
import binascii
import hmac
from ipaddress import ip_address
from typing import NamedTuple

from tornado.httputil import HTTPServerRequest
from tornado.web import RequestHandler, stream_request_body

from config.settings import FlowerSettings

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# The page of tasks reads by POST because its query is too long for a URL (flower 2.2).
READ_BY_POST = "/tasks/datatable"

READ_ONLY = "This login sees everything and changes nothing: to do that, log in with FLOWER_BASIC_AUTH."


class User(NamedTuple):
    """A user who is logged in."""

    name: str
    can_write: bool


class AccessDenied(Exception):
    """A request is refused, with this HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)


class Authenticator:
    """Finds the user of a request and checks that the user may send it."""

    def __init__(self, flower: FlowerSettings, prefix: str) -> None:
        self._header, self._proxies = flower.trusted_header, flower.trusted_proxies
        self._read_by_post = prefix + READ_BY_POST
        logins = ((flower.basic_auth, True), (flower.read_only_auth, False))
        # "user:password" is compared as a whole. A login that is not set admits nobody.
        self._logins = [
            (text.encode(), User(text.partition(":")[0], can_write))
            for login, can_write in logins
            if (text := login.get_secret_value())
        ]

    def authenticate(self, request: HTTPServerRequest) -> User:
        """Return the user of `request`.

        Raises AccessDenied without a login, and when a read-only user wants to change something.
        """
        by_header = self._authenticate_by_header(request)
        by_password = self._authenticate_by_password(request.headers.get("Authorization", ""))
        # The read-only login stays read-only, whatever a proxy says of the user.
        user = by_password if by_password and not by_password.can_write else by_header or by_password
        if user is None:
            raise AccessDenied(401, "Log in with FLOWER_BASIC_AUTH.")
        if not user.can_write and self.is_write(request):
            raise AccessDenied(403, READ_ONLY)
        return user

    def is_write(self, request: HTTPServerRequest) -> bool:
        """Whether a request can change something."""
        by_post = request.method == "POST" and request.path == self._read_by_post
        return request.method not in SAFE_METHODS and not by_post

    def _authenticate_by_header(self, request: HTTPServerRequest) -> User | None:
        if not self._is_from_proxy(request):
            return None
        names = request.headers.get_list(self._header)
        if len(names) > 1:
            # One of them may come from the client.
            message = f"{self._header} is there {len(names)} times: have the proxy replace what clients send."
            raise AccessDenied(400, message)
        name = "".join(names).strip()
        return User(name, can_write=True) if name else None

    def _is_from_proxy(self, request: HTTPServerRequest) -> bool:
        """Whether the connection comes from a trusted proxy; headers such as X-Forwarded-For do not count."""
        if not self._proxies:
            return False
        peer = ip_address(request.connection.context.address[0])
        return any(peer in network for network in self._proxies)

    def _authenticate_by_password(self, authorization: str) -> User | None:
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return None
        if scheme.lower() != "basic":
            return None
        # All logins are compared, so that the time taken does not tell which one is nearly right.
        found = [user for login, user in self._logins if hmac.compare_digest(given, login)]
        return found[0] if found else None


@stream_request_body
class AccessDeniedHandler(RequestHandler):  # type: ignore[misc]
    """Answers a request that is refused, before its body is read."""

    def initialize(self, error: AccessDenied) -> None:
        self._error = error

    def prepare(self) -> None:
        self.set_status(self._error.status)
        if self._error.status == 401:
            # Without the charset browsers may send a password that is not ASCII in another encoding.
            self.set_header("WWW-Authenticate", 'Basic realm="Flower", charset="UTF-8"')
        self.finish(f"{self._error.message}\n")

    def data_received(self, chunk: bytes) -> None:
        """Drop the rest of the body."""

    def check_xsrf_cookie(self) -> None:
        """Skip the check: the request is refused in any case."""
