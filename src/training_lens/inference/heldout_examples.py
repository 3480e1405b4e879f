"""Held-out examples: the rows that a run is evaluated on, which it did not train on, or others that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.data.batching import hold_out
from training_lens.data.examples import Example
from training_lens.data.notes import DataNotes, describe_bad_rows
from training_lens.data.source_reader import read_examples, read_source_examples
from training_lens.data.sources import expand_sources
from training_lens.data.token_pipeline import CHUNK, collect_example_errors, tokenize
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.session import Session
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)


def validation_examples(
    run: RunFolder, session: Session, limit: int | None = None, others: Sequence[object] | None = None
) -> list[Example]:
    """The run's validation rows that fit the model of its session, in their files' order. Logs how many do not fit.

    Args:
        limit: the most examples; the first that fit.
        others: sources to read in place of the run's own validation rows.

    Raises:
        ConfigurationError: the run had no validation rows, and no others are given.
        DatasetError: a source is missing or unreadable, or has changed, so that its held-out rows are unknown.
    """
    data = session.config.data
    rows = read_validation_rows(run, data) if others is None else read_examples(others, "data.validation", data)
    return filter_fitting(rows, session, limit)


def configured_examples(session: Session, limit: int | None = None) -> list[Example]:
    """The validation rows of the session's own config that fit the model: those that `train` would validate on.

    Raises:
        ConfigurationError: the config gives no validation rows.
        DatasetError: a source is missing or cannot be read.
    """
    data = session.config.data
    if sources := data.validation_sources:
        return filter_fitting(read_examples(sources, "data.validation", data), session, limit)
    if not data.val_ratio:
        raise ConfigurationError(
            "there are no rows to evaluate on; give data.validation, or data.train and data.val_ratio."
        )
    found = _filter_with_digests(read_examples(data.train, "data.train", data), session)
    if len(found) < 2:
        raise ConfigurationError("data.val_ratio: one example cannot be split; give more rows or data.validation.")
    digests = np.array([digest for _, digest in found], dtype=np.uint64)
    _, held_out = hold_out(digests, data.val_ratio, session.config.training.seed)
    return [found[i][0] for i in held_out[:limit]]


def filter_fitting(examples: Iterable[Example], session: Session, limit: int | None = None) -> list[Example]:
    """The first `limit` examples that training would keep. Logs how many it would drop before them."""
    return [example for example, _ in _filter_with_digests(examples, session, limit)]


def _filter_with_digests(
    examples: Iterable[Example], session: Session, limit: int | None = None
) -> list[tuple[Example, int]]:
    """As `filter_fitting`, each with the digest of its content."""
    found: list[tuple[Example, int]] = []
    left_out, remaining, notes = 0, iter(examples), DataNotes()
    while chunk := list(islice(remaining, min(CHUNK, CHUNK if limit is None else limit - len(found)))):
        try:
            tokenized = tokenize(chunk, session.preparation, notes)
        except DatasetError as error:
            raise (collect_example_errors([*chunk, *remaining], session.preparation) or error) from error
        found += [(example, row.digest) for example, row in zip(chunk, tokenized, strict=True) if row is not None]
        left_out += tokenized.count(None)
    for line in describe_bad_rows(notes.bad_row_reasons):
        logger.warning("%s", line)
    left_out -= sum(len(rows) for reasons in notes.bad_row_reasons.values() for rows in reasons.values())
    if left_out:
        logger.warning(
            "%d of %d rows are left out: nothing of an answer fits model.seq_len=%d with data.truncation=%s",
            left_out, left_out + len(found), session.preparation.seq_len, session.config.data.truncation,
        )  # fmt: skip
    return found


def read_validation_rows(run: RunFolder, data: DataSection) -> Iterator[Example]:
    """All validation rows of a run with these settings, in their files' order; raises as `validation_examples`."""
    if data.val_ratio:
        return _read_held_out(run, data)
    if sources := data.validation_sources:
        for name in find_changed_sources(run, sources, "validation"):
            logger.warning("%s: has changed since the run validated on it; these are its rows now", name)
        return read_examples(sources, "data.validation", data)
    raise ConfigurationError(
        f"the run {run.run_id} had no validation rows to evaluate it on; give data.validation, or train with "
        "data.validation or data.val_ratio."
    )


def _read_held_out(run: RunFolder, data: DataSection) -> Iterator[Example]:
    """The rows that the run held out, identified by file and row; so the files must be unchanged."""
    held_out = set(run.read_metadata("held_out.json"))
    if changed := find_changed_sources(run, data.train, "train"):
        raise DatasetError(
            f"{', '.join(changed)}: has changed since the run {run.run_id} held rows of it out, so they can no longer "
            "be distinguished from those that it trained on. Restore the old file, or evaluate on other rows with "
            "data.validation=FILE."
        )
    return (e for e in read_examples(data.train, "data.train", data) if e.id in held_out)


def find_changed_sources(run: RunFolder, specs: Sequence[object], split: str) -> list[str]:
    """Sources that differ from what the run read."""
    recorded = run.read_metadata("data.json")[split]["files"]
    return [s.name for s in expand_sources(specs, f"data.{split}") if recorded.get(s.name) != s.sha256]


def read_training_tokens(session: Session, at_least: int) -> list[int]:
    """At least so many tokens of the run's rendered training rows, one after the other, or all of them.

    Raises:
        DatasetError: a source is missing or cannot be read, or none of its rows fits.
    """
    data, tokens = session.config.data, list[int]()
    for source in expand_sources(data.train, "data.train"):
        examples = read_source_examples(source, data)
        while chunk := list(islice(examples, CHUNK)):
            for row in tokenize(chunk, session.preparation):
                tokens += row.input_ids.tolist() if row is not None else []
            if len(tokens) >= at_least:
                return tokens
    if not tokens:
        raise DatasetError("data.train: none of its rows fits the model any more.")
    return tokens
