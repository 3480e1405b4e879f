"""A file of prompts to a file of answers, written window by window, so that it can be killed and resumed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.sources import DataSource, expand_sources
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError, DatasetError, TrainingLensError
from training_lens.inference.generator import generate_answers
from training_lens.inference.prompts import PromptReader, SkippedRow, read_answer_line, read_lines
from training_lens.inference.session import Session
from training_lens.models.adapter_files import CONFIG, WEIGHTS
from training_lens.models.location import locate_model
from training_lens.utils.files import hash_file, require_writable, resolve_file_path
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WINDOW = 256  # rows answered together: their batches and samples depend on nothing else
NAMED = 20  # skipped rows that the log names; the report has them all


@dataclass(frozen=True)
class FileReport:
    """Counts of the input's rows."""

    output: str
    rows: int
    answered: int
    passed_over: tuple[SkippedRow, ...]
    resumed: int  # answers that were in the output before
    cut: int = 0  # answers that reached `max_new_tokens` or the model's last position
    unmarked: int = 0  # answers of an earlier version, which does not say whether they were cut


def answer_file(
    session: Session,
    source: DataSource,
    output: Path | str,
    settings: InferenceSection,
    *,
    domain: str | None = None,
    base: bool = False,
    progress: Progress | None = None,
) -> FileReport:
    """Write the answer to every row of `source` to `output`, a JSON line each, in the rows' order; resumes a file.

    A call that was killed and repeated writes what an uninterrupted one would have: an incomplete window is answered as
    a whole, and the missing lines are appended. Without a `domain` for every row each has its own.

    Raises:
        DatasetError: no row can be answered.
        ConfigurationError: `output` does not hold the start of what would be written now; it is left as it is.
    """
    rows = read_lines(source, session.config.data)
    lines = AnswerLines(Path(output))
    reader = PromptReader(session, rows, source, domain, describe_answerer(session, settings, base))
    passed_over: list[SkippedRow] = []
    answered = resumed = 0
    with (progress or Progress()).task("answering", len(rows)) as advance:
        for number, start in enumerate(range(0, len(rows), WINDOW)):
            prompts, skipped = reader.read_prompts(rows[start : start + WINDOW])
            passed_over += skipped
            kept = lines.match_prompts(prompts, source)
            answered, resumed = answered + len(prompts), resumed + kept
            advance(len(skipped) + (len(prompts) if kept == len(prompts) else 0))
            if kept < len(prompts):
                ids = [prompt.ids for prompt in prompts]
                answers = generate_answers(session, ids, settings, base=base, draw=number, advance=advance)
                lines.append_lines([p.output_line(answer) for p, answer in zip(prompts, answers, strict=True)][kept:])
    lines.refuse_more_lines(source)
    for item in passed_over[:NAMED]:
        logger.warning("%s, row %d passed over: %s", source.name, item.row, item.reason)
    if len(passed_over) > NAMED:
        logger.warning("and %d more rows passed over", len(passed_over) - NAMED)
    if not answered:
        raise DatasetError(f"{source.name}: none of its {len(rows)} rows can be answered.")
    cut, unmarked = lines.finish_reasons["length"], lines.finish_reasons[None]
    return FileReport(str(output), len(rows), answered, tuple(passed_over), resumed, cut, unmarked)


def input_file(name: str) -> DataSource:
    """The one file that `--input` means.

    Raises:
        DatasetError: it is not there; ConfigurationError: it means several.
    """
    files = expand_sources([name], "--input")
    if len(files) > 1:
        raise ConfigurationError(f"--input {name}: matches {len(files)} files; give one, with an output for each.")
    return files[0]


def output_file(name: str, source: DataSource) -> Path:
    """The file that `--output` means, checked before any work.

    Raises:
        ConfigurationError: it is the input, a folder, or in a folder that is not there or cannot be written.
    """
    path = resolve_file_path(name, f"--output {name}")
    if path.exists() and path.samefile(source.files[0]):
        raise ConfigurationError(f"--output {name}: is the input itself; give another file.")
    require_writable(path.parent, "--output")
    return path


def describe_answerer(session: Session, settings: InferenceSection, base: bool) -> str:
    """What decides the answer to a prompt, as JSON: the model, its stop tokens and the sampling settings.

    A local base is identified by its name and configuration, an adapter by its weights, read once (sha256).
    """
    model, adapter = session.config.model, None if base else session.adapter
    files = [Path(locate_model(model)) / name for name in ("config.json", "generation_config.json")]
    files += [adapter / name for name in (CONFIG, WEIGHTS)] if adapter else []
    sampled = set(InferenceSection.model_fields) - {"adapter", "drafts"}
    deciding = {"max_new_tokens"} if settings.temperature == 0 else sampled
    parts = {
        "base": [model.id, model.revision, model.quantization, model.dtype, session.precision],
        "files": [hash_file(file) for file in files if file.is_file()],
        "stop_ids": sorted(session.stop_ids),
        "settings": settings.model_dump(include=deciding),
    }
    return json.dumps(parts, sort_keys=True)


class AnsweredRow(Protocol):
    """A row of the input as the output is matched with it."""

    @property
    def row(self) -> int: ...

    def explain_mismatch(self, line: bytes, place: str) -> str | None:
        """Why a complete line does not answer the row, called `place`; None if it does."""

    def can_start_with(self, cut: bytes) -> bool:
        """Whether an incomplete line may be the start of the row's."""


class AnswerLines:
    """The output file: its complete lines, matched with rows one after the other, and the lines appended to it."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        self._path = path
        self._size = content.rfind(b"\n") + 1
        self._cut = content[self._size :]  # our own incomplete line is overwritten by the next
        self._left = content[: self._size].splitlines(keepends=True)
        self._matched = 0
        self.finish_reasons: Counter[str | None] = Counter()  # of all answers; None of a line that has none

    def match_prompts(self, prompts: Sequence[AnsweredRow], source: DataSource) -> int:
        """How many of the prompts have their line already; refuses a line that does not answer its prompt."""
        lines, self._left = self._left[: len(prompts)], self._left[len(prompts) :]
        for prompt, line in zip(prompts, lines, strict=False):
            self._matched += 1
            if mismatch := prompt.explain_mismatch(line, f"row {prompt.row} of {source.name}"):
                raise self._make_refusal(f"line {self._matched} {mismatch}")
        self._count_finish_reasons(lines)
        if self._cut and len(lines) < len(prompts):
            prompt = prompts[len(lines)]
            if not prompt.can_start_with(self._cut):
                raise self._make_refusal(
                    f"its last line has no end and does not begin as the answer to row {prompt.row} of {source.name} "
                    "would, so it belongs to another input or to other settings"
                )
            self._cut = b""
        return len(lines)

    def _count_finish_reasons(self, lines: Sequence[bytes]) -> None:
        self.finish_reasons.update((read_answer_line(line) or {}).get("finish_reason") for line in lines)

    def refuse_more_lines(self, source: DataSource) -> None:
        if more := len(self._left) + bool(self._cut):
            raise self._make_refusal(f"it has {more} lines more than {source.name} has answers")

    def _make_refusal(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"--output {self._path}: {what}. The file is left as it is: give another one, or delete it."
        )

    def append_lines(self, lines: Sequence[bytes]) -> None:
        """Write the lines after the complete ones, and flush them to the disk."""
        self._count_finish_reasons(lines)
        try:
            with self._path.open("r+b" if self._path.exists() else "xb") as file:
                file.seek(self._size)
                file.truncate()
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
        except OSError as error:
            raise TrainingLensError(
                f"--output {self._path}: cannot be written ({error.strerror}). What it holds is kept: run again."
            ) from error
