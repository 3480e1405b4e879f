"""Serves the dashboard with uvicorn: on this machine alone, or elsewhere with a token."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

import uvicorn

from training_lens.ui.app import build_app
from training_lens.ui.guard import Access
from training_lens.ui.web import Outputs
from training_lens.web.listener import format_address, is_loopback, listen

MOST_CONNECTIONS = 256
SECONDS_TO_CLOSE = 2  # for open streams, when the server stops


def serve(outputs: Outputs, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the dashboard until SIGINT or SIGTERM.

    Args:
        port: 0 takes any that is free.
        announce: takes the address once the server listens, with the token if one is needed.

    Raises:
        ConfigurationError: the address cannot be used.
    """
    listener = listen(host, port, MOST_CONNECTIONS)
    port = listener.getsockname()[1]
    access = Access(port, None if is_loopback(host) else secrets.token_urlsafe(24), host)
    announce(f"{format_address(host, port)}/" + (f"?token={access.token}" if access.token else ""))
    config = uvicorn.Config(
        build_app(outputs, access),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        ws="none",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_worth_showing)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log is no request that was cancelled, as open pages are when the server ends."""
    kind = record.exc_info[0] if record.exc_info else None
    is_cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
    return not (is_cancelled or "timeout graceful shutdown" in record.getMessage())
