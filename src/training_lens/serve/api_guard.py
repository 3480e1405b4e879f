"""Checks of a request before its body is read: host, key, size and type."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from training_lens.serve.access_log import record_of
from training_lens.serve.api_errors import ApiError
from training_lens.web.body_limit import BodyTooLargeError, has_large_body, limit_body
from training_lens.web.listener import LOOPBACK, list_loopback_hosts

OPEN_PATHS = ("/health", "/ready")  # for process supervisors, which have no key
MOST_DISCARDED = 256 << 20  # bytes of a refused body that are still read, so that its sender gets to the answer


@dataclass(frozen=True)
class ApiAccess:
    """Who may use the server.

    Without a `key` only this machine can reach it, and the Host header of a request must name this machine. `host` and
    `port` are the server's own.
    """

    port: int
    body_bytes: int
    key: str | None = None
    host: str = LOOPBACK[0]

    def find_fault(self, scope: Scope) -> ApiError | None:
        """Why a request is refused; None if it is not."""
        headers = Headers(scope=scope)
        hosts = list_loopback_hosts(self.port, self.host)
        if self.key is None and headers.get("host", "").lower() not in hosts:
            return ApiError(421, f"This server answers only at {', '.join(hosts)}.", "wrong_host")
        if self.key is not None and scope["path"] not in OPEN_PATHS and not self._accepts(headers):
            return ApiError(
                401,
                "Incorrect API key provided: give the server's own as 'Authorization: Bearer KEY'.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if has_large_body(headers, self.body_bytes):
            return too_large(self.body_bytes)
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json"
        ):
            return ApiError(
                415, "The body must be JSON, with the header Content-Type: application/json.", "unsupported_media_type"
            )
        return None

    def _accepts(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        assert self.key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())


def too_large(most: int) -> ApiError:
    return ApiError(413, f"The body of a request may have at most {most:,} bytes.", "request_too_large")


class ApiGuard:
    """ASGI middleware that refuses requests before they are read."""

    def __init__(self, app: ASGIApp, access: ApiAccess) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fault = self._access.find_fault(scope)
        if fault is None:
            try:
                await self._app(scope, limit_body(receive, self._access.body_bytes), send)
                return
            except BodyTooLargeError:  # before any response: only the routes read bodies
                fault = too_large(self._access.body_bytes)
        record_of(Request(scope)).outcome = str(fault.code)
        await _discard_body(receive)
        await fault.as_response()(scope, receive, send)


async def _discard_body(receive: Receive) -> None:
    """Read the rest of a body: a sender whose connection closes while it sends would not see the answer."""
    read = 0
    while read < MOST_DISCARDED:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
