"""The routes of the OpenAI API, and those for monitoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from training_lens.serve.access_log import CLIENT_CLOSED, record_of
from training_lens.serve.api_answers import AnswerWriter
from training_lens.serve.api_errors import ApiError
from training_lens.serve.api_types import ChatRequest, CompletionRequest, GenerationRequest, read_request
from training_lens.serve.request_builder import RequestBuilder
from training_lens.serve.running_request import RunningRequest
from training_lens.serve.scheduler import Scheduler
from training_lens.serve.served_models import ServedModel, ServedModels
from training_lens.serve.server_metrics import ServerMetrics
from training_lens.serve.stream import EventStream, wait_for_answers, wait_for_first
from training_lens.utils.files import replace_non_finite


@dataclass(frozen=True)
class OpenAIRoutes:
    """The handlers of the routes."""

    models: ServedModels
    scheduler: Scheduler
    metrics: ServerMetrics
    builder: RequestBuilder

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.describe_model),
            Route("/v1/chat/completions", self.complete_chat, methods=["POST"]),
            Route("/v1/completions", self.complete_text, methods=["POST"]),
            Route("/health", self.report_health),
            Route("/ready", self.report_readiness),
            Route("/metrics", self.report_metrics),
        ]

    async def list_models(self, request: Request) -> Response:
        models = self.models.by_name.values()
        return JSONResponse({"object": "list", "data": [self._describe(model) for model in models]})

    async def describe_model(self, request: Request) -> Response:
        return JSONResponse(self._describe(self.models.find_model(request.path_params["name"])))

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        values = {"id": model.name, "object": "model", "created": self.models.started, "owned_by": "training-lens"}
        parent = None if model.is_base else self.models.base.name
        domains = list(model.session.domains or ())
        return {**values, "parent": parent, "max_model_len": model.positions, "domains": domains}

    async def report_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def report_readiness(self, request: Request) -> Response:
        is_ready = self.scheduler.is_ready
        return JSONResponse({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)

    async def report_metrics(self, request: Request) -> Response:
        return Response(self.metrics.write_page(), media_type=self.metrics.content_type)

    async def complete_chat(self, request: Request) -> Response:
        return await self._answer(request, *read_request(await request.body(), ChatRequest))

    async def complete_text(self, request: Request) -> Response:
        return await self._answer(request, *read_request(await request.body(), CompletionRequest))

    async def _answer(self, request: Request, asked: GenerationRequest, ignored: Sequence[str]) -> Response:
        running = await self._start_request(request, asked)
        headers = {"x-ignored-fields": ", ".join(ignored)} if ignored else {}
        writer = AnswerWriter(running, isinstance(asked, ChatRequest))
        try:
            if asked.stream:
                first = await wait_for_first(running)
                return EventStream(self.scheduler, writer, first, usage=asked.includes_usage, headers=headers)
            await wait_for_answers(running, request)
        except BaseException:  # also where the connection's task is cancelled
            self.scheduler.cancel_request(running)
            raise
        return JSONResponse(replace_non_finite(writer.write_answer()), headers=headers)

    async def _start_request(self, request: Request, asked: GenerationRequest) -> RunningRequest:
        """Hand a request to the scheduler; an `ApiError` where it cannot be answered."""
        record = record_of(request)
        record.model = self.models.find_model(asked.model).name
        record.running = running = await run_in_threadpool(self.builder.build_request, asked)
        self.scheduler.submit_request(running)
        return running


async def report_api_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed as expected."""
    assert isinstance(error, ApiError)
    record_of(request).outcome = error.code or "error"
    return error.as_response()


async def report_hang_up(request: Request, error: Exception) -> Response:
    """The client has gone, so nobody reads this; the log has the status."""
    return Response(status_code=CLIENT_CLOSED)
