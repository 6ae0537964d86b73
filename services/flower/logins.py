"""Who sees Flower and who may act: two logins, and proxies that have logged the user in themselves."""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass
from ipaddress import ip_address

from tornado.httputil import HTTPServerRequest

from config.settings import FlowerSettings

# What changes nothing, by HTTP's own rules.
LOOKING = ("GET", "HEAD", "OPTIONS")
# POST because the table's question is too long for an address (flower 2.2).
LOOKED_AT_BY_POST = "/tasks/datatable"

READ_ONLY = "This login sees everything and changes nothing: to do that, log in with FLOWER_BASIC_AUTH."


@dataclass(frozen=True)
class Visitor:
    """Somebody who is logged in."""

    name: str
    may_act: bool


class Refusal(Exception):
    """Why a request is not answered, with the status that says so."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence
        super().__init__(sentence)


class Door:
    """Lets requests in, or says why not."""

    def __init__(self, flower: FlowerSettings, prefix: str) -> None:
        self._header, self._proxies = flower.trusted_header, flower.trusted_proxies
        self._looked_at_by_post = prefix + LOOKED_AT_BY_POST
        logins = ((flower.basic_auth, True), (flower.read_only_auth, False))
        # User, colon and password as one. A login that is not set is nobody's.
        self._logins = [
            (text.encode(), Visitor(text.partition(":")[0], may_act))
            for login, may_act in logins
            if (text := login.get_secret_value())
        ]

    def admit(self, request: HTTPServerRequest) -> Visitor:
        """Whose request this is. Raises Refusal for a stranger, and for somebody who may not do this."""
        by_header, by_password = self._by_header(request), self._by_password(request.headers.get("Authorization", ""))
        # Who is said to look only does so whatever else a proxy says.
        visitor = by_password if by_password and not by_password.may_act else by_header or by_password
        if visitor is None:
            raise Refusal(401, "Log in with FLOWER_BASIC_AUTH.")
        if not visitor.may_act and self.acts(request):
            raise Refusal(403, READ_ONLY)
        return visitor

    def acts(self, request: HTTPServerRequest) -> bool:
        """Whether a request is there to change something."""
        by_post = request.method == "POST" and request.path == self._looked_at_by_post
        return request.method not in LOOKING and not by_post

    def _by_header(self, request: HTTPServerRequest) -> Visitor | None:
        if not self._is_from_proxy(request):
            return None
        names = request.headers.get_list(self._header)
        if len(names) > 1:
            # One of them may be the client's own.
            raise Refusal(400, f"{self._header} is there {len(names)} times: have the proxy replace what clients send.")
        name = "".join(names).strip()
        return Visitor(name, may_act=True) if name else None

    def _is_from_proxy(self, request: HTTPServerRequest) -> bool:
        """By the other end of the connection, whatever headers say of who is behind it."""
        if not self._proxies:
            return False
        peer = ip_address(request.connection.context.address[0])
        return any(peer in network for network in self._proxies)

    def _by_password(self, authorization: str) -> Visitor | None:
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return None
        if scheme.lower() != "basic":
            return None
        # Each of them is compared, so that the time taken does not tell which one is nearly right.
        found = [visitor for login, visitor in self._logins if hmac.compare_digest(given, login)]
        return found[0] if found else None
