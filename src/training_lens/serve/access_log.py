"""One line of JSON for each request: what it took and how it ended, and nothing of its text."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_lens.serve.running_request import RunningRequest
from training_lens.serve.server_metrics import ServerMetrics

CLIENT_CLOSED = 499  # the status of a request whose client hung up
LONGEST_ID = 128
LONGEST_PATH = 200
WATCHED = ("/health", "/ready", "/metrics")  # polled every few seconds, so not logged


@dataclass
class AccessRecord:
    """What is known of a request so far."""

    request_id: str
    model: str = ""
    outcome: str = "ok"  # or the code of an error, or "cancelled"
    running: RunningRequest | None = None
    status: int = CLIENT_CLOSED  # until a response starts
    started: float = field(default_factory=time.monotonic)


def record_of(request: Request) -> AccessRecord:
    """The record of a request, which its handlers fill."""
    record: AccessRecord = request.scope["state"]["record"]
    return record


class AccessLog:
    """ASGI middleware that writes the log, counts requests, and gives each an id.

    Args:
        write_line: takes a line without its end.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, write_line: Callable[[str], None]) -> None:
        self._app, self._metrics, self._write_line = app, metrics, write_line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = AccessRecord(_choose_id(Headers(scope=scope)))
        scope.setdefault("state", {})["record"] = record
        is_complete = False

        async def send_noted(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            is_complete = is_complete or (
                message["type"] == "http.response.body" and not message.get("more_body", False)
            )
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:  # a fault of ours, which the outermost middleware answers
            record.outcome, record.status, is_complete = "internal_error", 500, True
            raise
        finally:
            if not is_complete or record.status == CLIENT_CLOSED:
                record.outcome, record.status = "cancelled", CLIENT_CLOSED
            self._finish(scope, record)

    def _finish(self, scope: Scope, record: AccessRecord) -> None:
        seconds = time.monotonic() - record.started
        path = scope["path"] if record.model else "other"
        self._metrics.note_request(record.model, path, record.status, seconds)
        if record.outcome == "cancelled":
            self._metrics.note_cancelled()
        running = record.running
        if running:
            first = None if running.first_token is None else running.first_token - running.started
            self._metrics.note_answer(record.model, running.prompt_tokens, running.answer_tokens, first)
        if scope["path"] not in WATCHED:
            self._write_line(json.dumps(_describe_request(scope, record, seconds)))


def _choose_id(headers: Headers) -> str:
    """The client's id where it is a plain word, else a new one."""
    given = headers.get("x-request-id", "")
    is_plain = given.isascii() and given.replace("-", "").replace("_", "").isalnum() and len(given) <= LONGEST_ID
    return given if is_plain else uuid.uuid4().hex


def _describe_request(scope: Scope, record: AccessRecord, seconds: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": (scope.get("client") or ("", 0))[0],
        "method": scope["method"],
        "path": scope["path"][:LONGEST_PATH],
        "status": record.status,
        "outcome": record.outcome,
        "seconds": round(seconds, 4),
    }
    if (running := record.running) is None:
        return values
    first = None if running.first_token is None else round(running.first_token - running.started, 4)
    return values | {
        "model": record.model,
        "streamed": running.streams,
        "prompt_tokens": running.prompt_tokens,
        "answer_tokens": running.answer_tokens,
        "first_token_seconds": first,
        "finish_reasons": [row.finish_reason for row in running.rows],
    }
