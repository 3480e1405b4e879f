"""Answers on their way to the client: waited for, or sent as server-sent events; a client that hangs up ends them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from training_lens.serve.api_answers import AnswerWriter
from training_lens.serve.api_errors import ApiError
from training_lens.serve.running_request import Piece, RunningRequest, merge_pieces
from training_lens.serve.scheduler import Scheduler
from training_lens.utils.files import replace_non_finite


class HangUpError(Exception):
    """The client hung up before it had its answer."""


async def wait_for_answers(running: RunningRequest, request: Request) -> None:
    """Wait until all answers of a request are finished.

    Raises:
        ApiError: the request failed; HangUpError: the client hung up.
    """
    hang_up = asyncio.ensure_future(_wait_for_hang_up(request))
    finish = asyncio.ensure_future(collect_answers(running))
    try:
        await asyncio.wait({hang_up, finish}, return_when=asyncio.FIRST_COMPLETED)
        if not finish.done():
            raise HangUpError
        finish.result()
    finally:
        hang_up.cancel()
        finish.cancel()


async def _wait_for_hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect_answers(running: RunningRequest) -> None:
    """Wait until all answers of a request that is not streamed are finished; an `ApiError` where they cannot be."""
    missing = len(running.rows)
    while missing:
        piece = await running.pieces.get()
        if isinstance(piece, ApiError):
            raise piece
        missing -= 1


async def wait_for_first(running: RunningRequest) -> list[Piece]:
    """The first pieces of a stream, so that errors before them have a status of their own.

    Raises:
        ApiError: there are none.
    """
    piece = await running.pieces.get()
    if isinstance(piece, ApiError):
        raise piece
    return [piece]


class EventStream(StreamingResponse):
    """Pieces as server-sent events; the rows are freed when the connection closes.

    Args:
        first: pieces that were read already.
    """

    def __init__(
        self, scheduler: Scheduler, writer: AnswerWriter, first: list[Piece], *, usage: bool, headers: Mapping[str, str]
    ) -> None:
        super().__init__(self._write_events(first, usage), headers=dict(headers), media_type="text/event-stream")
        self._scheduler, self._writer = scheduler, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._scheduler.cancel_request(self._writer.request)

    async def _write_events(self, pieces: list[Piece], usage: bool) -> AsyncIterator[bytes]:
        running, writer = self._writer.request, self._writer
        missing = len(running.rows)
        if writer.is_chat:
            for row in running.rows:
                yield write_event(writer.write_opening(row.index))
        while True:
            yield b"".join(write_event(writer.write_chunk(piece)) for piece in merge_pieces(pieces))
            missing -= sum(piece.finish_reason is not None for piece in pieces)
            if not missing:
                break
            try:
                pieces = await _read_pieces(running)
            except ApiError as error:
                yield write_event(error.as_json())
                break
        if not missing and usage:
            yield write_event(writer.write_usage_chunk())
        yield b"data: [DONE]\n\n"


async def _read_pieces(running: RunningRequest) -> list[Piece]:
    """All pieces that have come by now, one at least."""
    found = [await running.pieces.get()]
    while not running.pieces.empty():
        found.append(running.pieces.get_nowait())
    error = next((piece for piece in found if isinstance(piece, ApiError)), None)
    if error:
        raise error
    return [piece for piece in found if isinstance(piece, Piece)]


def write_event(values: Mapping[str, Any]) -> bytes:
    """One server-sent event; numbers that are not finite are null."""
    text = json.dumps(replace_non_finite(dict(values)), ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
