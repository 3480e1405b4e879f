"""The socket of a server, and who can reach it."""

from __future__ import annotations

import errno
import ipaddress
import socket

from training_lens.errors import ConfigurationError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 80  # which clients leave out of the Host header
PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES, None)  # None: of an OverflowError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def list_loopback_hosts(port: int, host: str = LOOPBACK[0]) -> tuple[str, ...]:
    """The Host headers, in lower case, of a server that only this machine can reach, at `host`.

    A page of another site whose name was made to point here sends another one (DNS rebinding).
    """
    names = dict.fromkeys([*LOOPBACK, _format_host(host)])
    with_port = tuple(f"{name}:{port}" for name in names)
    return (*with_port, *names) if port == HTTP_PORT else with_port


def listen(host: str, port: int, most_connections: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        ConfigurationError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(most_connections)
    except (OSError, OverflowError) as error:
        listener.close()
        is_port = getattr(error, "errno", None) in PORT_ERRORS
        port_hint = "Give another --port, or --port 0 for any that is free."
        remedy = port_hint if is_port else "Give an address of this machine as --host."
        raise ConfigurationError(f"cannot listen on {host}, port {port} ({error}). {remedy}") from error
    return listener


def format_address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://{_format_host(host)}:{port}"


def _format_host(host: str) -> str:
    """A host as URLs and Host headers write it."""
    return f"[{host}]" if ":" in host else host
