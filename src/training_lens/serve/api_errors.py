"""Errors as the OpenAI API writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response

from training_lens.utils.secrets import redact_text


@dataclass
class ApiError(Exception):
    """What a client gets: an HTTP status, and a message with what was found and what to do."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        kinds = {429: "rate_limit_error", 401: "authentication_error", 504: "timeout_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def as_json(self) -> dict[str, object]:
        values = {"message": redact_text(self.message), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": values}

    def as_response(self) -> Response:
        return JSONResponse(self.as_json(), self.status, dict(self.headers))


def unknown_model(name: str, known: str) -> ApiError:
    return ApiError(404, f"There is no model '{name[:200]}' here. {known}", "model_not_found", "model")


def prompt_too_long(message: str) -> ApiError:
    return ApiError(400, message, "context_length_exceeded", "prompt")


def queue_full(waiting: int, seconds: int) -> ApiError:
    message = f"The queue is full: {waiting} answers wait. Try again in {seconds} s."
    return ApiError(429, message, "queue_full", headers={"Retry-After": str(seconds)})


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", "shutting_down", headers={"Retry-After": "10"})


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"The answer was not finished within {seconds:g} s.", "request_timeout")


def internal_error(message: str) -> ApiError:
    return ApiError(500, message, "internal_error")
