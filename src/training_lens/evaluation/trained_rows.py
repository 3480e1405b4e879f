"""Which of the rows that a model is evaluated on are among those that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training_lens.config.run_config import locate_outputs
from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import limit_examples
from training_lens.data.leaks import LEAK_TEXTS, find_leaks
from training_lens.data.sources import expand_sources
from training_lens.data.token_cache import prepare_sources
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation
from training_lens.display.progress import Progress
from training_lens.errors import TrainingLensError
from training_lens.inference.session import Session
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import describe_error


@dataclass(frozen=True)
class TrainedRows:
    """The rows of an evaluation that are training rows, too.

    `leaked` (rows,) bool; None if that is unknown, and then `reason` says why. `counts` are leaking rows by kind, as in
    `leaks.LEAK_KINDS`.
    """

    leaked: np.ndarray | None
    counts: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def join(self, other: TrainedRows) -> TrainedRows:
        """The rows that either of two models was trained on; of each kind, the larger count."""
        if self.leaked is None or other.leaked is None:
            return self if self.leaked is None else other
        counts = {kind: max(count, other.counts.get(kind, 0)) for kind, count in self.counts.items()}
        return TrainedRows(self.leaked | other.leaked, counts)

    def describe(self) -> str:
        """'48 of 144 rows are training rows: 16 equal but for white space, ...', or why that is not known."""
        if self.leaked is None:
            return f"leaks not checked: {self.reason}"
        kinds = ", ".join(f"{count:,} {text}" for kind, text in LEAK_TEXTS.items() if (count := self.counts.get(kind)))
        return f"{int(self.leaked.sum()):,} of {len(self.leaked):,} rows are training rows, too: {kinds}"

    def as_json(self) -> dict[str, Any]:
        if self.leaked is None:
            return {"checked": False, "reason": self.reason}
        return {"checked": True, "rows": int(self.leaked.sum()), "of": len(self.leaked), **self.counts}


UNKNOWN_ROWS = TrainedRows(None, reason="the training rows are unknown")


def find_trained_rows(run: RunFolder | None, session: Session, rows: TokenDataset, progress: Progress) -> TrainedRows:
    """Compare rows with the training rows of a run, from its token cache or its unchanged sources."""
    if run is None:
        return TrainedRows(None, reason="the model is no run, so its training rows are unknown")
    try:
        leaks = find_leaks(open_training_rows(run, session.config, session.preparation, progress), rows)
    except (TrainingLensError, OSError) as error:
        return TrainedRows(None, reason=describe_error(error))
    return TrainedRows(leaks.is_leaked, leaks.counts)


def open_training_rows(
    run: RunFolder, config: TrainingConfig, preparation: Preparation, progress: Progress
) -> TokenDataset:
    """The tokens that the run trained on: without the rows that it held out or left out, and without canaries.

    Raises:
        TrainingLensError: a source is missing or has changed.
    """
    data, seed, report = config.data, config.training.seed, run.read_metadata("data.json")
    recorded = report["train"]["files"]
    sources = expand_sources(data.train, "data.train")
    changed = [source.name for source in sources if recorded.get(source.name) != source.sha256]
    if changed:
        raise TrainingLensError(f"{', '.join(changed)} has changed since the run trained on it")
    split = prepare_sources(sources, "data.train", preparation, locate_outputs(run) / "cache", progress).dataset
    others = {*report.get("excluded", ()), *(run.read_metadata("held_out.json") if data.val_ratio else ())}
    if others:
        split = split.select(np.flatnonzero([row_id not in others for row_id in split.ids]))
    return limit_examples(split, data.max_examples, seed)
