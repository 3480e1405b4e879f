"""Serves the dashboard with uvicorn: on this machine alone, or elsewhere with a token."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable

import uvicorn

from training_lens.errors import ConfigurationError
from training_lens.ui.app import build_app
from training_lens.ui.guard import Access
from training_lens.ui.web import Outputs

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
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    access = Access(port, None if is_loopback(host) else secrets.token_urlsafe(24))
    shown = f"[{host}]" if ":" in host else host
    announce(f"http://{shown}:{port}/" + (f"?token={access.token}" if access.token else ""))
    config = uvicorn.Config(
        build_app(outputs, access),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        ws="none",
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(
            f"the dashboard cannot listen on {host}, port {port} ({error}). Give another --port, or --port 0 for any "
            "that is free."
        ) from error
    return listener
