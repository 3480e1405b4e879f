"""The rows that a run trained on, as it read them: tokens and texts by row id, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from training_lens.config.run_config import MODEL_CODE, open_run_config
from training_lens.config.schema import TrainingConfig
from training_lens.data.canaries import SOURCE, Canaries
from training_lens.data.templates import build_renderer, resolve_date
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation, tokenizer_hash
from training_lens.data.tokenization import TextEncoder
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError, TrainingLensError
from training_lens.evaluation.trained_rows import open_training_rows
from training_lens.models.factory import load_tokenizer
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import did_you_mean

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
            ConfigurationError: there is no such training row; names the nearest ids.
        """
        if row_id in self.places:
            return self.places[row_id]
        hint = did_you_mean(row_id, list(self.places), otherwise=f" The first is {next(iter(self.places))}.")
        raise ConfigurationError(
            f"'{row_id}' is none of the {len(self.places)} rows that this run trained on. An id is a source and a row "
            f"number.{hint}"
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
    tokenizer = load_tokenizer(config.model, saved)
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
