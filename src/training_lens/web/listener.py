"""The socket of a server, and who can reach it."""

from __future__ import annotations

import ipaddress
import socket

from training_lens.errors import ConfigurationError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def list_loopback_hosts(port: int) -> tuple[str, ...]:
    """The Host headers by which a server on this machine alone is named.

    A page of another site whose name was made to point here does not name it so (DNS rebinding).
    """
    return tuple(f"{name}:{port}" for name in LOOPBACK)


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
        raise ConfigurationError(
            f"cannot listen on {host}, port {port} ({error}). Give another --port, or --port 0 for any that is free."
        ) from error
    return listener


def format_address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
