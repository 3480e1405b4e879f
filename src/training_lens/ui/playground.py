"""The playground: a prompt answered by a finished run's base and adapter, streamed side by side, and scored."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from training_lens.config.run_config import read_run_config
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.data.fields import are_plain_texts
from training_lens.data.row_keys import ALIASES, plain_name
from training_lens.errors import OutOfMemoryError, TrainingLensError
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.held_out_prompts import draw_held_out_prompt, has_held_out
from training_lens.ui.playground_models import PlaygroundModels, answer_question
from training_lens.ui.playground_request import (
    LARGEST_SCALE,
    LONGEST_PROMPT,
    MOST_NEW_TOKENS,
    Question,
    list_sampling,
    read_prompt,
    read_question,
)
from training_lens.ui.web import Outputs, json_response, read_body
from training_lens.utils.files import read_json, replace_non_finite
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import describe_shortage
from training_lens.utils.secrets import redact_text

logger = get_logger(__name__)
POSITION_KEYS = ("max_position_embeddings", "n_positions")  # of a config.json; the second is GPT-2's
LIMITS = {"characters": LONGEST_PROMPT, "max_new_tokens": MOST_NEW_TOKENS, "scale": LARGEST_SCALE}


def describe_playground(run: RunFolder, models: PlaygroundModels) -> dict[str, Any]:
    """What the form needs. Nothing is loaded for it; `reason` says why the run cannot answer."""
    form: dict[str, Any] = {"can_answer": False, "reason": "", "domains": [], "sampling": None, "limits": LIMITS}
    form |= {"loaded": models.has_loaded(run), "busy": models.is_busy, "has_system": None, "positions": None}
    form |= {"continues_text": False, "domain_style": "none", "chosen_scale": 1.0, "has_held_out": False}
    try:
        config = read_run_config(run)
        form |= {"sampling": list_sampling(config.inference), "domain_style": config.data.domain.style}
        form |= {"positions": _read_positions(config.model), "chosen_scale": run.adapter_scale}
        form |= _describe_data(run, config) | {"has_held_out": has_held_out(run)}
        run.require_adapter()
        form["can_answer"] = True
    except (TrainingLensError, OSError) as error:
        form["reason"] = explain_error(error)
    return form


def _describe_data(run: RunFolder, config: TrainingConfig) -> dict[str, Any]:
    """The run's domains, whether it continues plain texts, and whether its prompts had a system message.

    `has_system` is None where the rows are chats, some of which may have one.
    """
    data, fields = run.read_metadata("data.json"), config.data.fields
    mappings = list(map(str, data["train"]["mappings"].values()))
    pairs = [mapping.split(" -> ")[0].split(" + ") for mapping in mappings if " -> " in mapping]
    names = {fields.system, *ALIASES["system"]}
    found = any(key in names or plain_name(key) in names for keys in pairs for key in keys)
    is_text = are_plain_texts(mappings, fields)
    has_system = found if found or is_text or len(pairs) == len(mappings) else None
    return {"domains": list(data["domains"]), "continues_text": is_text, "has_system": has_system}


def _read_positions(model: ModelSection) -> int | None:
    """The positions of a base model whose files are here; None where they are not known before it is loaded."""
    from training_lens.models.location import local_folder

    try:
        folder = local_folder(model)
        values = read_json(folder / "config.json") if folder else {}
        values = values.get("text_config", values)
        found = [values[key] for key in POSITION_KEYS if isinstance(values.get(key), int)]
    except (TrainingLensError, OSError, ValueError, AttributeError):
        return None
    return int(found[0]) if found else None


def explain_error(error: BaseException) -> str:
    """An error in words, without secrets."""
    if isinstance(error, TrainingLensError):
        return redact_text(str(error))
    return describe_shortage(error) or describe_error(error)


class ClientGoneError(Exception):
    """Nobody reads the lines any more, so the work for them ends."""


class LineStream:
    """Lines of JSON that a thread sends while an event loop passes them on.

    `work` is given the stream, and calls `begin_lines` once the request is known to be good: errors before that are
    raised in `start_thread`, and later ones become a last line, `{"error": ...}`. When the stream is closed, the next
    `send_line` or `check_client` raises in the thread.
    """

    def __init__(self, work: Callable[[LineStream], None]) -> None:
        self._work, self._loop = work, asyncio.get_running_loop()
        self._lines: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._is_closed, self._has_begun = threading.Event(), False

    async def start_thread(self) -> None:
        """Start the thread, and wait until it has begun to send."""
        threading.Thread(target=self._run_work, daemon=True, name="playground").start()
        try:
            first = await self._lines.get()
        except asyncio.CancelledError:
            self.close_stream()
            raise
        if isinstance(first, Exception):
            if not isinstance(first, TrainingLensError) and (shortage := describe_shortage(first)):
                raise OutOfMemoryError(shortage) from first
            raise first

    async def iterate_lines(self) -> AsyncIterator[bytes]:
        """The lines, until the work has ended."""
        while isinstance(line := await self._lines.get(), bytes):
            yield line

    def close_stream(self) -> None:
        """End the work at its next `send_line` or `check_client`."""
        self._is_closed.set()

    def check_client(self) -> None:
        """Raise `ClientGoneError` once the stream is closed."""
        if self._is_closed.is_set():
            raise ClientGoneError

    def begin_lines(self) -> None:
        """Let `start_thread` return."""
        self._has_begun = True
        self._put(b"")

    def send_line(self, values: Mapping[str, Any]) -> None:
        """Send a line; numbers that are not finite are null."""
        self.check_client()
        text = json.dumps(replace_non_finite(dict(values)), ensure_ascii=False, separators=(",", ":"))
        self._put(f"{text}\n".encode("utf-8", "replace"))

    def _put(self, line: bytes | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)
        except RuntimeError as error:  # the server has stopped
            raise ClientGoneError from error

    def _run_work(self) -> None:
        try:
            try:
                self._work(self)
            except ClientGoneError:
                raise
            except Exception as error:
                self._report_error(error)
            self._put(None)
        except ClientGoneError:
            pass

    def _report_error(self, error: Exception) -> None:
        if not self._has_begun:
            self._put(error)
            return
        if not isinstance(error, TrainingLensError | OSError):
            logger.exception("the playground failed")
        self.send_line({"error": explain_error(error)})


class LineResponse(StreamingResponse):
    """A stream of lines, which is closed with the connection."""

    def __init__(self, stream: LineStream) -> None:
        super().__init__(stream.iterate_lines(), media_type="application/x-ndjson")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close_stream()


def build_playground_routes(outputs: Outputs, models: PlaygroundModels | None = None) -> list[Route]:
    """The routes of the playground; `models` keeps the model between requests."""
    kept = models or PlaygroundModels()

    async def send_form(request: Request) -> Response:
        run = outputs.requested_run(request)
        return json_response(await run_in_threadpool(describe_playground, run, kept))

    async def send_held_out(request: Request) -> Response:
        run = outputs.requested_run(request)
        return json_response((await run_in_threadpool(draw_held_out_prompt, run)).as_json())

    async def send_tokens(request: Request) -> Response:
        run, prompt = outputs.requested_run(request), read_prompt(await read_body(request))

        def spell_prompt() -> dict[str, Any]:
            with kept.use_model(run) as loaded:
                return loaded.spell_prompt(prompt)

        return json_response(await run_in_threadpool(spell_prompt))

    async def stream_answer(request: Request) -> Response:
        run, body = outputs.requested_run(request), await read_body(request)
        question = await run_in_threadpool(_read_question, run, body)
        return await _open_answer_stream(kept, run, question)

    async def unload_model(request: Request) -> Response:
        run = outputs.requested_run(request)
        return json_response({"unloaded": await run_in_threadpool(kept.unload_model, run)})

    path = "/api/runs/{experiment}/{run}/playground"
    return [
        Route(path, send_form),
        Route(f"{path}/held-out", send_held_out),
        Route(f"{path}/tokens", send_tokens, methods=["POST"]),
        Route(f"{path}/answer", stream_answer, methods=["POST"]),
        Route(f"{path}/unload", unload_model, methods=["POST"]),
    ]


def _read_question(run: RunFolder, body: Mapping[str, Any]) -> Question:
    """The question, with the run's own settings for keys that the body lacks."""
    return read_question(body, read_run_config(run).inference, run.adapter_scale)


async def _open_answer_stream(models: PlaygroundModels, run: RunFolder, question: Question) -> Response:
    """The answers as a stream, once the model is loaded and the prompt is known to fit."""

    def answer_lines(stream: LineStream) -> None:
        with models.use_model(run) as loaded:
            prompt_ids = loaded.prompt_ids(question.prompt)
            stream.begin_lines()
            answer_question(loaded, question, prompt_ids, stream.send_line, stream.check_client)

    stream = LineStream(answer_lines)
    await stream.start_thread()
    return LineResponse(stream)
