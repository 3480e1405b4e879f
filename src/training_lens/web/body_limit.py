"""A limit on the bytes of a request."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Message, Receive


class BodyTooLargeError(Exception):
    """A body without a length, or with a false one, went over the limit."""


def has_large_body(headers: Headers, most: int) -> bool:
    """Whether a request announces more bytes, or a length that is not a number."""
    length = headers.get("content-length", "0")
    return not length.isascii() or not length.isdigit() or int(length[:20]) > most


def limit_body(receive: Receive, most: int) -> Receive:
    """Receive at most so many bytes; a `BodyTooLargeError` beyond."""
    read = 0

    async def receive_limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise BodyTooLargeError
        return message

    return receive_limited
