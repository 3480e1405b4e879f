"""Which rows a run trains on and which it validates on, and in how many steps it visits them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import DataMixture, Schedule, hold_out, limit_examples
from training_lens.data.canaries import SOURCE, Canaries
from training_lens.data.row_list import read_row_list
from training_lens.data.token_cache import Split, append_examples
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import format_count
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class PlanRows:
    """The examples of a run. `excluded` are the ids of rows that data.exclude leaves out, `duplicates` counts of
    `count_duplicates`, which know no canaries."""

    train: TokenDataset
    validation: TokenDataset | None
    duplicates: dict[str, int]
    excluded: tuple[str, ...] = ()
    canaries: Canaries | None = None

    @property
    def fingerprint(self) -> str:
        """Tells apart what is chosen of one split: its number of examples, and what was left out or added."""
        others = (
            [*self.excluded, *((row.id, row.answer) for row in self.canaries.rows)] if self.canaries else self.excluded
        )
        digest = f":{hashlib.sha256(repr(others).encode()).hexdigest()[:16]}" if others else ""
        return f"{len(self.train)}{digest}"

    def count_planted(self) -> int:
        """How many of the training examples are canaries."""
        return sum(row.repeats for row in self.canaries.rows) if self.canaries else 0

    def as_record(self) -> dict[str, Any]:
        """For metadata/data.json: the rows left out and the canaries, where there are any."""
        record: dict[str, Any] = {"excluded": list(self.excluded)} if self.excluded else {}
        return record | ({"canaries": self.canaries.as_record()} if self.canaries else {})


def select_rows(config: TrainingConfig, splits: dict[str, Split], preparation: Preparation) -> PlanRows:
    """The rows of a run: all of data.train but those held out and excluded, at most max_examples; and the canaries.

    Rows are held out as without data.exclude, so that two runs are measured on the same ones.

    Raises:
        ConfigurationError, DatasetError: too few rows, an id in data.exclude that is none, or canaries that do not fit.
    """
    seed, everything = config.training.seed, splits["train"].dataset
    validation = splits["validation"].dataset if "validation" in splits else None
    left_out = _find_excluded(config, everything)
    train = everything.select(np.flatnonzero(~left_out)) if left_out.any() else everything
    if config.data.val_ratio:
        if len(everything) < 2:
            raise ConfigurationError("data.val_ratio: one example cannot be split; give more rows or data.validation.")
        learned, held = hold_out(everything.digests, config.data.val_ratio, seed)
        train, validation = (everything.select(part[~left_out[part]]) for part in (learned, held))
    if not len(train) or (validation is not None and not len(validation)):
        raise ConfigurationError(f"data.exclude: '{config.data.exclude}' leaves no row. List fewer.")
    train = limit_examples(train, config.data.max_examples, seed)
    if validation is None:
        logger.info(
            "no rows are held out: there will be no validation loss, and no verdict on whether the adapter is "
            "better; give data.validation=FILE or data.val_ratio=0.1"
        )
    duplicates = count_duplicates(train, validation)
    excluded = tuple(everything.select(np.flatnonzero(left_out)).ids) if left_out.any() else ()
    if not config.data.canaries:
        return PlanRows(train, validation, duplicates, excluded)
    canaries = Canaries.draw(config.data.canaries, config.data.canary_repeats, seed)
    planted = canaries.tokenize_planted(preparation)
    repeats = ", ".join(map(str, config.data.canary_repeats))
    logger.info(
        "data.canaries: %d made-up rows are planted %s times an epoch, %d in all, beside %s rows; the adapter may say "
        "their codes (training-lens explain memory)",
        *(config.data.canaries * len(config.data.canary_repeats), repeats, len(planted), format_count(len(train))),
    )
    return PlanRows(append_examples(train, planted), validation, duplicates, excluded, canaries)


def _find_excluded(config: TrainingConfig, everything: TokenDataset) -> np.ndarray:
    """The examples that data.exclude lists, (examples,) bool; logs how many."""
    if config.data.exclude is None:
        return np.zeros(len(everything), dtype=bool)
    listed = read_row_list(config.data.exclude)
    listed.require_rows(everything)
    found = listed.find_rows(everything)
    logger.info("data.exclude: %d of %d rows are left out, as %s lists them", found.sum(), len(found), listed.path)
    return found


def count_duplicates(train: TokenDataset, validation: TokenDataset | None) -> dict[str, int]:
    """Count equal examples (but for white space) within training, and between training and validation."""
    known = np.unique(train.digests)
    repeated = len(train) - len(known)
    shared = int(np.isin(validation.digests, known).sum()) if validation is not None else 0
    return {"repeated_train_examples": repeated, "validation_examples_in_train": shared}


def build_schedule(config: TrainingConfig, train: TokenDataset, split: Split, global_batch: int) -> Schedule:
    """The steps over the rows, with the weights of data.train's entries.

    Raises:
        ConfigurationError: a weight so small that its entry gives no row.
    """
    training, mix = config.training, None
    if config.data.weights is not None:
        canary = len(config.data.weights)  # planted canaries are an entry of their own, taken once an epoch
        entries = np.array([canary if file == SOURCE else split.entries[file] for file in train.files])
        mix = DataMixture(entries, (*config.data.weights, *([1.0] if canary in entries else [])))
        empty = next((i for i, size in enumerate(mix.entry_sizes) if not size), None)
        if empty is not None:
            raise ConfigurationError(
                f"data.weights: entry {empty + 1} of data.train, with weight {config.data.weights[empty]:g}, gives "
                f"none of its {int((entries == empty).sum())} examples. Raise its weight, or leave it out; what two "
                "entries name belongs to the first."
            )
    return Schedule(len(train), global_batch, training.epochs, training.max_steps, training.seed, mix)
