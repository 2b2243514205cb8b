"""Who may ask: whoever knows the token, under a name of this machine; and what a page of ours may do.

A page of anyone that is open in the same browser can send requests to this address, and a name of anyone's can be made
to point at it. So each request needs the token (in the address of the page, else as ``Authorization: Bearer``), which
is compared in constant time; a ``Host`` that is an address or a name of this machine (DNS rebinding needs another
one); and, where a browser says from which page it comes, this very page. Bodies are bounded. The page itself may load
nothing and send to nobody but this server.

Source: Jackson et al. 2007, "Protecting Browsers from DNS Rebinding Attacks" (ACM CCS), for the check of ``Host``.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from tl_em.errors import UsageError

MOST_BYTES = 1_000_000
"""Of a body."""
_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def policy(nonce: str) -> str:
    """The Content-Security-Policy of the page."""
    return (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def refused(status: int, said: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An error, in the form that OpenAI's clients read."""
    error = {"message": said, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


class Guard:
    """What every request passes first.

    Args:
        app: that it is passed on to.
        token: that must be known.
        host: that was listened at, whose name is allowed too.
    """

    def __init__(self, app: Any, token: str, host: str) -> None:
        self.app, self.token = app, token.encode()
        self.names = {"localhost", host.casefold(), socket.gethostname().casefold()}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal)(scope, receive, guarded)

    def _refusal(self, scope: Any) -> JSONResponse | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_here(host):
            return refused(
                421, "the request names a host that is not this machine, as a page elsewhere would; use the address "
                "that tl-em serve printed"
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].casefold() != host.casefold():
            return refused(403, "the request comes from another page, which may not ask here; open the printed address")
        if not self._knows(scope, headers):
            return refused(
                401, "the token is missing or wrong, so it is unknown who asks; use the address that tl-em serve "
                "printed, or send its token as the API key (Authorization: Bearer)", "authentication_error",
            )  # fmt: skip
        return None

    def _is_here(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").casefold()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def _knows(self, scope: Any, headers: dict[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.casefold() == "bearer":
            return hmac.compare_digest(given.strip().encode("latin-1"), self.token)
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):  # a page is opened by its address alone
            found = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
            return hmac.compare_digest(found[0].encode(), self.token)
        return False


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that was sent.

    Raises:
        UsageError: too much, or no such thing.
    """
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > MOST_BYTES:
                raise UsageError(f"the request holds more than {MOST_BYTES} bytes, and is not read on; send less text")
        found = json.loads(bytes(data).decode())
    except (ValueError, RecursionError, ClientDisconnect) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError("the request holds no JSON that can be read, so it asks nothing; send one object") from error
    if not isinstance(found, dict):
        raise UsageError("the request holds JSON that is no object, so it is unknown what is what; send one object")
    return found
