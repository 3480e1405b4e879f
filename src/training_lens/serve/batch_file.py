"""Files in OpenAI's batch format: each line a request with a `custom_id`, answered by a line with the same id.

A line that cannot be answered gets a line that says why; the others go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.sources import DataSource
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError
from training_lens.inference.batch import WINDOW, AnswerLines, FileReport, describe_answerer
from training_lens.inference.generator import SEED_STRIDE
from training_lens.inference.prompts import SkippedRow, read_answer_line
from training_lens.serve.api_answers import AnswerWriter
from training_lens.serve.api_errors import ApiError
from training_lens.serve.api_types import MOST_CHOICES, ChatRequest, CompletionRequest, GenerationRequest, read_request
from training_lens.serve.request_builder import RequestBuilder
from training_lens.serve.scheduler import Scheduler
from training_lens.serve.served_models import ServedModels
from training_lens.serve.server_limits import ServerLimits
from training_lens.serve.server_metrics import ServerMetrics
from training_lens.serve.stream import collect_answers
from training_lens.utils.files import replace_non_finite
from training_lens.utils.limits import ROW_BYTES, load_bounded_json, open_file

KEYS = frozenset({"custom_id", "method", "url", "body"})
CHAT, _TEXT = ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
SECONDS = 1e9  # a file has no deadline


def is_batch_file(path: Path) -> bool:
    """Whether the first line of a file has the keys of OpenAI's batch format."""
    if path.suffix != ".jsonl":
        return False
    with open_file(path) as file:
        first = next((line for line in iter(lambda: file.readline(ROW_BYTES), b"") if line.strip()), b"")
    value = read_answer_line(first)
    return value is not None and value.keys() >= KEYS


@dataclass(frozen=True)
class BatchLine:
    """A line of the input: its number from 1, its text, and what decides its answer, as a hash."""

    row: int
    text: bytes
    identity: str

    @property
    def custom_id(self) -> Any:
        return (read_answer_line(self.text) or {}).get("custom_id")

    def explain_mismatch(self, line: bytes, place: str) -> str | None:
        """See `AnsweredRow`."""
        value = read_answer_line(line)
        if value is None or value.get("id") != self.identity:
            return (
                f"does not answer {place} as it is now: the line, the model, the adapter or the settings have changed"
            )
        return None

    def can_start_with(self, cut: bytes) -> bool:
        """See `AnsweredRow`."""
        start = f'{{"id": "{self.identity}"'.encode()
        return start.startswith(cut) or cut.startswith(start)

    def write_answer(self, body: Mapping[str, Any] | None, error: ApiError | None) -> bytes:
        """Its line of the output."""
        status, shown = (200, body) if error is None else (error.status, error.as_json())
        response = {"status_code": status, "request_id": self.identity, "body": shown}
        failure = None if error is None else {"code": error.code, "message": error.message}
        values = {"id": self.identity, "custom_id": self.custom_id, "response": response, "error": failure}
        return json.dumps(replace_non_finite(values), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def read_batch_lines(source: DataSource, answerer: str) -> list[BatchLine]:
    """The lines of a file that are not empty; `answerer` describes the models and settings."""
    with open_file(source.files[0]) as file:
        texts = [(number, text.strip()) for number, text in enumerate(file, 1)]
    lines = []
    for number, text in texts:
        if text:
            digest = hashlib.sha256(json.dumps([answerer, number, text.hex()]).encode()).hexdigest()
            lines.append(BatchLine(number, text, f"batch_req_{digest[:24]}"))
    return lines


def answer_batch_file(
    models: ServedModels,
    source: DataSource,
    output: Path,
    settings: InferenceSection,
    progress: Progress | None = None,
) -> FileReport:
    """Answer each line of a batch file by a line of `output`, in order; resumes a file.

    Raises:
        DatasetError: no line can be answered.
        ConfigurationError: `output` does not hold the start of what would be written now; it is left as it is.
    """
    answerer = [
        name + describe_answerer(model.session, settings, model.is_base) for name, model in models.by_name.items()
    ]
    rows, lines = read_batch_lines(source, json.dumps(answerer)), AnswerLines(output)
    repeated = _find_repeated_ids(rows)
    skipped: list[SkippedRow] = []
    cut = resumed = 0
    with _Answerer(models, settings) as service, (progress or Progress()).task("answering", len(rows)) as advance:
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            kept = lines.match_prompts(window, source)
            resumed += kept
            advance(kept)
            if kept < len(window):
                answers = service.answer_lines(window[kept:], repeated, advance)
                lines.append_lines(answers)
        lines.refuse_more_lines(source)
    for row, line in zip(rows, output.read_bytes().splitlines() if rows else [], strict=True):
        error, lengths = _read_result(line)
        cut += lengths
        if error:
            skipped.append(SkippedRow(row.row, error))
    if len(skipped) == len(rows):
        reason = skipped[0].reason if skipped else "it is empty"
        raise DatasetError(f"{source.name}: none of its {len(rows)} lines can be answered: {reason}")
    return FileReport(str(output), len(rows), len(rows) - len(skipped), tuple(skipped), resumed, cut)


def _find_repeated_ids(rows: Sequence[BatchLine]) -> set[int]:
    """The numbers of lines whose `custom_id` an earlier line has, too."""
    seen: set[str] = set()
    repeated = set()
    for row in rows:
        name = json.dumps(row.custom_id)
        if name in seen:
            repeated.add(row.row)
        seen.add(name)
    return repeated


def _read_result(line: bytes) -> tuple[str | None, bool]:
    """Why a line of the output has no answer, None if it has one; and whether an answer was cut."""
    value = load_bounded_json(line)
    if value["error"]:
        return str(value["error"]["message"]), False
    return None, any(choice["finish_reason"] == "length" for choice in value["response"]["body"]["choices"])


class _Answerer:
    """The scheduler of a server, without a server."""

    def __init__(self, models: ServedModels, settings: InferenceSection) -> None:
        positions = max(model.positions or 0 for model in models.by_name.values())
        tokens = max(settings.batch_tokens, 2 * positions)  # one request always fits
        self._loop = asyncio.new_event_loop()
        self._scheduler = Scheduler(
            models,
            ServerLimits(queue=32 * WINDOW, cache_tokens=tokens, seconds=SECONDS),
            ServerMetrics(),
            self._post,
        )
        self._builder = RequestBuilder(models, settings, self._scheduler.outbox, SECONDS)
        self._settings = settings

    def _post(self, work: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(work)

    def __enter__(self) -> _Answerer:
        self._scheduler.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._scheduler.stop()
        self._loop.close()

    def answer_lines(
        self, rows: Sequence[BatchLine], repeated: set[int], advance: Callable[[float], None]
    ) -> list[bytes]:
        """The output lines of these rows, which are decoded together."""

        async def answer_all() -> list[bytes]:
            return await asyncio.gather(*(self._answer_line(row, row.row in repeated, advance) for row in rows))

        return self._loop.run_until_complete(answer_all())

    async def _answer_line(self, row: BatchLine, is_repeated: bool, advance: Callable[[float], None]) -> bytes:
        try:
            line = row.write_answer(await self._answer_request(row, is_repeated), None)
        except ApiError as error:
            line = row.write_answer(None, error)
        advance(1)
        return line

    async def _answer_request(self, row: BatchLine, is_repeated: bool) -> dict[str, Any]:
        asked = _read_line(row, is_repeated)
        if asked.stream:
            raise ApiError(400, "stream: a line of a file cannot be streamed.", "invalid_value", "stream")
        if asked.seed is None:  # lines with the same prompt draw different answers, and the same ones again
            seed = self._settings.seed + row.row * MOST_CHOICES * SEED_STRIDE
            asked = asked.model_copy(update={"seed": seed % 2**32})
        running = self._builder.build_request(asked)
        self._scheduler.submit_request(running)
        await collect_answers(running)
        return AnswerWriter(running, isinstance(asked, ChatRequest)).write_answer()


def _read_line(row: BatchLine, is_repeated: bool) -> GenerationRequest:
    """The request of a line.

    Raises:
        ApiError: the line is not a request.
    """
    value = read_answer_line(row.text)
    if value is None or not value.keys() >= KEYS:
        raise ApiError(400, f"expected an object with {', '.join(sorted(KEYS))}.", "invalid_json")
    if not isinstance(value["custom_id"], str):
        raise ApiError(400, "custom_id: expected text.", "invalid_value", "custom_id")
    if is_repeated:
        raise ApiError(400, f"custom_id: an earlier line has '{value['custom_id'][:100]}' already.", "invalid_value")
    if value["method"] != "POST" or value["url"] not in ENDPOINTS:
        raise ApiError(
            400, f"expected POST and one of {', '.join(ENDPOINTS)} as method and url.", "invalid_value", "url"
        )
    body = json.dumps(value["body"]).encode()
    if value["url"] == CHAT:
        return read_request(body, ChatRequest)[0]
    return read_request(body, CompletionRequest)[0]
