"""Serves models with uvicorn until a signal, and then finishes the requests in progress."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.serve.access_key import check_access
from training_lens.serve.access_log import AccessLog
from training_lens.serve.api_errors import ApiError, internal_error
from training_lens.serve.api_guard import ApiAccess, ApiGuard
from training_lens.serve.openai_routes import OpenAIRoutes, report_api_error, report_hang_up
from training_lens.serve.request_builder import RequestBuilder
from training_lens.serve.scheduler import Scheduler
from training_lens.serve.served_models import ServedModels
from training_lens.serve.server_limits import ServerLimits
from training_lens.serve.server_metrics import ServerMetrics
from training_lens.serve.stream import HangUpError
from training_lens.web.listener import format_address, listen

MOST_CONNECTIONS = 4096
ENDPOINTS = "The API has POST /v1/chat/completions, POST /v1/completions and GET /v1/models."
SECONDS_AFTER_DRAIN = 2  # for the last bytes of what was finished in time


@dataclass(frozen=True)
class ServedApi:
    """What one server answers with; `defaults` apply to settings that a request leaves out."""

    models: ServedModels
    limits: ServerLimits
    defaults: InferenceSection
    write_log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


def serve_api(api: ServedApi, host: str, port: int, key: str | None, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress then have `ServerLimits.drain_seconds`.

    Args:
        port: 0 takes any that is free.
        announce: takes the base address of the API once the server listens.

    Raises:
        ConfigurationError: the address cannot be used, or needs a key.
    """
    check_access(host, key)
    listener = listen(host, port, MOST_CONNECTIONS)
    port = listener.getsockname()[1]
    server = _DrainingServer(api, ApiAccess(port, api.limits.body_bytes, key, host))
    announce(f"{format_address(host, port)}/v1")
    with listener:
        server.run(sockets=[listener])


class _DrainingServer(uvicorn.Server):
    """Uvicorn's server, which tells the scheduler at a signal to take no more requests."""

    def __init__(self, api: ServedApi, access: ApiAccess) -> None:
        self._api = api
        self._scheduler: Scheduler | None = None
        config = uvicorn.Config(
            self._build_app(access),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=None,
            timeout_graceful_shutdown=int(api.limits.drain_seconds) + SECONDS_AFTER_DRAIN,
            ws="none",
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At a first signal stop to take requests; a second SIGINT ends at once."""
        if self._scheduler:
            self._scheduler.drain()
        super().handle_exit(sig, frame)

    def _build_app(self, access: ApiAccess) -> Starlette:
        api, metrics = self._api, ServerMetrics()
        loops = list[asyncio.AbstractEventLoop]()
        scheduler = Scheduler(api.models, api.limits, metrics, lambda work: _call_in(loops, work))
        self._scheduler = scheduler
        builder = RequestBuilder(api.models, api.defaults, scheduler.outbox, api.limits.seconds)

        @asynccontextmanager
        async def run_scheduler(app: Starlette) -> AsyncIterator[None]:
            loops.append(asyncio.get_running_loop())
            scheduler.start()
            yield
            scheduler.stop()

        handlers: dict[Any, Any] = {
            ApiError: report_api_error,
            HTTPException: _report_http_error,
            HangUpError: report_hang_up,
            ClientDisconnect: report_hang_up,
            Exception: _report_failure,
        }
        return Starlette(
            routes=OpenAIRoutes(api.models, scheduler, metrics, builder).routes(),
            middleware=[
                Middleware(AccessLog, metrics=metrics, write_line=api.write_log),
                Middleware(ApiGuard, access=access),
            ],
            exception_handlers=handlers,
            lifespan=run_scheduler,
        )


def _call_in(loops: list[asyncio.AbstractEventLoop], work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended, and its clients with it
        loops[0].call_soon_threadsafe(work)


async def _report_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path[:200]}: {error.detail}. {ENDPOINTS}"
    code, headers = codes.get(error.status_code), dict(error.headers or {})
    return await report_api_error(request, ApiError(error.status_code, message, code, headers=headers))


async def _report_failure(request: Request, error: Exception) -> Response:
    return internal_error("The server failed; its log says more.").as_response()
