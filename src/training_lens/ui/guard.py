"""What a request must show before the dashboard answers it: its Host, its origin, its token and its size."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from http.cookies import SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_lens.web.body_limit import has_large_body, limit_body
from training_lens.web.listener import LOOPBACK, list_loopback_hosts

COOKIE = "training_lens_token"
LONGEST_BODY = 1 << 20  # bytes of a request
LONGEST_URL = 8192  # bytes of path and query
READING = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Access:
    """Who may use the dashboard.

    `host` and `port` are the server's own. Without a `token` the server listens to this machine alone, and a request
    must name it in its Host header, see `list_loopback_hosts`.
    """

    port: int
    token: str | None = None
    host: str = LOOPBACK[0]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The Host headers that are answered without a token."""
        return list_loopback_hosts(self.port, self.host)

    def knows_host(self, host: str) -> bool:
        return self.token is not None or host.lower() in self.hosts

    def accepts_token(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())


class Guard:
    """ASGI middleware that refuses what a page of another site, a stranger or a broken client sends.

    A request of another method than GET and HEAD needs the dashboard's own origin and a JSON body, which no form of
    another site can send. The token is taken once from `?token=` of an address and is then kept in a cookie that pages
    of other sites do not send; programs give `Authorization: Bearer TOKEN`.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope)
        if refusal is not None:
            await refusal(scope, receive, _add_headers(send))
        else:
            await self._app(scope, limit_body(receive, LONGEST_BODY), _add_headers(send))

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if len(scope["path"]) + len(scope["query_string"]) > LONGEST_URL:
            return PlainTextResponse("The address is too long.\n", 414)
        if not self._access.knows_host(headers.get("host", "")):
            return PlainTextResponse(f"This server answers only at {', '.join(self._access.hosts)}.\n", 421)
        if scope["method"] not in READING and (fault := _find_cross_site_fault(headers)):
            return PlainTextResponse(f"{fault}\n", 403)
        if has_large_body(headers, LONGEST_BODY):
            return PlainTextResponse(f"A request may have {LONGEST_BODY:,} bytes.\n", 413)
        return self._check_token(scope, headers)

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self._access.token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and scope["method"] in READING and self._access.accepts_token(given):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            response = RedirectResponse(f"{_quote_path(scope)}{'?' if rest else ''}{rest}", 303)
            response.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
            return response
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._access.accepts_token(cookie.value if cookie else bearer):
            return None
        return PlainTextResponse("Open the address that training-lens ui printed: it holds the token.\n", 401)


def _quote_path(scope: Scope) -> str:
    """The path on this server: one '/' at its start, since two would name another host."""
    return "/" + str(scope["path"]).lstrip("/\\") if str(scope["path"]).isprintable() else "/"


def _find_cross_site_fault(headers: Headers) -> str:
    """Why a request that changes something did not come from the dashboard's own page; empty if it did.

    Programs other than browsers send neither `Origin` nor `Sec-Fetch-Site`.
    """
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "Refused: a page of another site sent this."
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return "Refused: a page of another site sent this."
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return "Refused: the body must be application/json."
    return ""


def _add_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return with_headers
