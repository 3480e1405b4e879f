"""A file of prompts to a file of answers: written window by window, so that it can be killed and run again."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.sources import DataSource, expand_sources
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError, DatasetError, TrainingLensError
from training_lens.inference.generator import generate_answers
from training_lens.inference.prompts import PassedOver, Question, QuestionReader, read_answer_line, read_lines
from training_lens.inference.session import Session
from training_lens.models.adapter_files import CONFIG, WEIGHTS
from training_lens.models.location import locate
from training_lens.utils.files import hash_file, require_writable, resolve_file_path
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
WINDOW = 256  # rows answered together: their batches, and what is drawn for them, depend on nothing else
NAMED = 20  # rows passed over that are named in the log; the report has them all


@dataclass(frozen=True)
class FileReport:
    """What became of the input's rows; `resumed` of the answers were in the output before.

    `cut` answers reached `max_new_tokens` or the model's last position before they ended; of `unmarked` ones,
    which an earlier version wrote, that is not known.
    """

    output: str
    rows: int
    answered: int
    passed_over: tuple[PassedOver, ...]
    resumed: int
    cut: int = 0
    unmarked: int = 0


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
    """Answer every row of `source` into `output`, a JSON line each, in the rows' order; go on where it stopped.

    A run that was killed and started again writes what an uninterrupted one would have: a window that was begun is
    answered as a whole, and the lines that are missing are added.

    Args:
        domain: of every row; None takes each row's own.

    Raises:
        DatasetError: no row can be answered.
        ConfigurationError: `output` holds anything but the beginning of what would be written now; it is left as it is.
    """
    rows = read_lines(source, session.config.data.csv)
    there = _Lines(Path(output))
    questions_of = QuestionReader(session, rows, source, domain, _answerer(session, settings, base))
    passed_over: list[PassedOver] = []
    answered = resumed = 0
    with (progress or Progress()).task("answering", len(rows)) as advance:
        for number, start in enumerate(range(0, len(rows), WINDOW)):
            questions, unusable = questions_of(rows[start : start + WINDOW])
            passed_over += unusable
            kept = there.answering(questions, source)
            answered, resumed = answered + len(questions), resumed + kept
            advance(len(unusable) + (len(questions) if kept == len(questions) else 0))
            if kept < len(questions):
                prompts = [question.ids for question in questions]
                given = generate_answers(session, prompts, settings, base=base, draw=number, advance=advance)
                there.add([q.line(answer) for q, answer in zip(questions, given, strict=True)][kept:])
    there.refuse_more(source)
    _name(passed_over, source)
    if not answered:
        raise DatasetError(f"{source.name}: none of its {len(rows)} rows can be answered.")
    ends = there.finish_reasons
    return FileReport(
        str(output), len(rows), answered, tuple(passed_over), resumed, cut=ends["length"], unmarked=ends[None]
    )


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


def _answerer(session: Session, settings: InferenceSection, base: bool) -> str:
    """What decides the answer to a prompt: the model that answers, where it stops, and how tokens are chosen.

    A local base is known by its name and configuration; of an adapter the weights are read once (sha256).
    """
    model, adapter = session.config.model, None if base else session.adapter
    files = [Path(locate(model)) / name for name in ("config.json", "generation_config.json")]
    files += [adapter / name for name in (CONFIG, WEIGHTS)] if adapter else []
    deciding = {"max_new_tokens"} if settings.temperature == 0 else set(InferenceSection.model_fields) - {"adapter"}
    parts = {
        "base": [model.id, model.revision, model.quantization, model.dtype, session.precision],
        "files": [hash_file(file) for file in files if file.is_file()],
        "stop_ids": sorted(session.stop_ids),
        "settings": settings.model_dump(include=deciding),
    }
    return json.dumps(parts, sort_keys=True)


def _name(passed_over: Sequence[PassedOver], source: DataSource) -> None:
    for item in passed_over[:NAMED]:
        logger.warning("%s, row %d passed over: %s", source.name, item.row, item.reason)
    if len(passed_over) > NAMED:
        logger.warning("and %d more rows passed over", len(passed_over) - NAMED)


class _Lines:
    """The output: the complete lines that it holds, of which some are matched with rows, and what is added.

    `finish_reasons` counts how the answers ended, of those that were there and of those that were added; by None
    those that do not say it.
    """

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        self._path = path
        self._size = content.rfind(b"\n") + 1
        self._cut = content[self._size :]  # a line of ours that was cut short goes when the next is added
        self._left = content[: self._size].splitlines(keepends=True)
        self._matched = 0
        self.finish_reasons: Counter[str | None] = Counter()

    def answering(self, questions: Sequence[Question], source: DataSource) -> int:
        """How many of the questions have their line already; the lines come in the questions' order.

        Raises:
            ConfigurationError: a line is not what the question's would be.
        """
        lines, self._left = self._left[: len(questions)], self._left[len(questions) :]
        for question, line in zip(questions, lines, strict=False):
            self._matched += 1
            if different := question.difference(line, f"row {question.row} of {source.name}"):
                raise self._refused(f"line {self._matched} {different}")
        self._count_finish_reasons(lines)
        if self._cut and len(lines) < len(questions):
            self._check_cut(questions[len(lines)], source)
        return len(lines)

    def _count_finish_reasons(self, lines: Sequence[bytes]) -> None:
        self.finish_reasons.update((read_answer_line(line) or {}).get("finish_reason") for line in lines)

    def _check_cut(self, question: Question, source: DataSource) -> None:
        if not question.begins_as(self._cut):
            raise self._refused(
                f"its last line has no end and does not begin as the answer to row {question.row} of {source.name} "
                "would, so it belongs to another input or to other settings"
            )
        self._cut = b""

    def refuse_more(self, source: DataSource) -> None:
        if more := len(self._left) + bool(self._cut):
            raise self._refused(f"it has {more} lines more than {source.name} has answers")

    def _refused(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"--output {self._path}: {what}. The file is left as it is: give another one, or delete it."
        )

    def add(self, lines: Sequence[bytes]) -> None:
        """Write the lines behind the complete ones, and through to the disk."""
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
