"""The rows that a run trained on, as it read them: tokens and texts by row id, without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training_lens.config.run_config import MODEL_CODE, open_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.data.canaries import SOURCE, Canaries
from training_lens.data.templates import build_renderer, resolve_date
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation, tokenizer_hash
from training_lens.data.tokenization import TextEncoder
from training_lens.display.html import ShortenedCell
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError, TrainingLensError
from training_lens.evaluation.evaluation_rows import open_training_rows
from training_lens.models.factory import load_tokenizer
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import nearest_name

LONGEST = 160  # characters of a prompt or an answer that a list shows


@dataclass(frozen=True)
class TrainingRows:
    """A run's training rows, without its canaries, which `canaries` holds."""

    config: TrainingConfig
    tokenizer: Any
    preparation: Preparation
    dataset: TokenDataset
    canaries: Canaries | None

    @cached_property
    def places(self) -> dict[str, int]:
        """The position of each row by its id; of a row that stands twice, the first."""
        return {row_id: place for place, row_id in reversed(list(enumerate(self.dataset.ids)))}

    def require_place(self, row_id: str) -> int:
        """The position of a row.

        Raises:
            ConfigurationError: there is no such training row; names the one that is meant.
        """
        if row_id in self.places:
            return self.places[row_id]
        raise ConfigurationError(
            f"'{row_id}' is none of the {len(self.places):,} rows that this run trained on. An id is a file as the run "
            f"recorded it and a row number.{suggest_row(row_id, self.dataset.ids)}"
        )

    def read_text(self, row_id: str) -> tuple[str, str]:
        """What is read and what is learned of a row, each in one line and shortened; empty for an unknown row."""
        if row_id.startswith(f"{SOURCE}:") and self.canaries:
            canary = next((row for row in self.canaries.rows if row.id == row_id), None)
            return (canary.question, canary.answer) if canary else ("", "")
        if row_id not in self.places:
            return "", ""
        example = self.dataset[self.places[row_id]]
        parts = (example.input_ids[~example.loss_mask], example.input_ids[example.loss_mask])
        prompt, answer = (str(self.tokenizer.decode(part.tolist(), skip_special_tokens=True)) for part in parts)
        return shorten_text(prompt), shorten_text(answer)


def suggest_row(given: str, ids: Sequence[str]) -> str:
    """The id that is meant, as the end of a message: that of this file's name and number, or of a like name."""
    matches = [row_id for row_id in ids if Path(row_id).name == Path(given).name]
    if len(matches) == 1:
        return f" Did you mean '{matches[0]}'?"
    if not ids:
        return ""
    sources = list(dict.fromkeys(row_id.rpartition(":")[0] for row_id in ids))
    nearest = nearest_name(given.rpartition(":")[0] or given, sources) or sources[0]
    return f" For example: {next(row_id for row_id in ids if row_id.rpartition(':')[0] == nearest)}."


def label_rows(ids: Iterable[str]) -> dict[str, ShortenedCell]:
    """A table's cell for each id, of which a page shows the file's name and the number: 'train.jsonl:17'.

    Ids of files of one name in several folders stay whole.
    """
    ids = list(ids)
    names = {source: Path(source).name for source in {row_id.rpartition(":")[0] for row_id in ids}}
    counts = Counter(names.values())
    found = {}
    for row_id in ids:
        source, _, number = row_id.rpartition(":")
        name = names[source] if counts[names[source]] == 1 else source
        found[row_id] = ShortenedCell(row_id, f"{name}:{number}")
    return found


def shorten_text(text: str, most: int = LONGEST) -> str:
    """A text in one line, its middle left out where it is long: both ends of a row tell it from others."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most * 2 // 3]} … {line[-most // 3 :]}"


def open_rows_of(run: RunFolder, progress: Progress, given: Mapping[str, Any] | None = None) -> TrainingRows:
    """The rows that a run trained on. Loads the tokenizer, and tokenizes the rows if the cache has them no more.

    Args:
        given: the user's consent to code of the run's model, see `open_run_config`.

    Raises:
        CheckpointError: the rows changed since, so that ids would name other ones.
        ConfigurationError: the tokenizer carries code that the user has not allowed.
    """
    config = open_run_config(run, given or {}, MODEL_CODE)
    saved = str(run.tokenizer) if run.tokenizer.is_dir() else None  # a run that has not ended yet has none
    tokenizer = load_tokenizer(config.model, saved, config.data.new_tokens)
    config = config.replace_keys(data={"date": resolve_date(config.data, tokenizer)})
    assert config.model.seq_len is not None, "a run's own config is resolved"
    encoder, hashed = TextEncoder(tokenizer), tokenizer_hash(tokenizer)
    renderer = build_renderer(config.data, tokenizer)
    preparation = Preparation(config.data, renderer, encoder, config.model.seq_len, hashed)
    try:
        dataset = open_training_rows(run, config, preparation, progress)
    except (TrainingLensError, OSError) as error:
        raise CheckpointError(
            f"the rows that {run.run_id} trained on cannot be read as they were, so its row ids would name others: "
            f"{str(error).rstrip('.')}. Put the old files back."
        ) from error
    record = run.read_metadata("data.json").get("canaries")
    return TrainingRows(config, tokenizer, preparation, dataset, Canaries.from_record(record) if record else None)
