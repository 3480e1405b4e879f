"""The rows that a run is judged on: those that it did not train on, or others of the user's choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from training_lens.data.batching import hold_out
from training_lens.data.preparation import read_examples, tokenize
from training_lens.data.types import Example
from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session
from training_lens.utils.runs import RunFolder


def validation_examples(
    run: RunFolder, session: Session, limit: int | None = None, others: Sequence[str] | None = None
) -> list[Example]:
    """The run's validation rows that fit the model, in their files' order.

    Args:
        session: of that run.
        limit: at most so many, the first that fit.
        others: sources to read in place of the run's own validation rows.

    Raises:
        ConfigurationError: the run had no validation rows, and no others are given.
        DatasetError: a source is missing or cannot be read.
    """
    return list(islice((e for e in _rows(run, session, others) if _fits(e, session)), limit))


def configured_examples(session: Session, limit: int | None = None) -> list[Example]:
    """The validation rows of the session's own config that fit the model: those that `train` would validate on.

    Raises:
        ConfigurationError: the config gives no validation rows.
        DatasetError: a source is missing or cannot be read.
    """
    data = session.config.data
    if data.validation_sources:
        found = read_examples(_paths(data.validation_sources), "data.validation", data)
        return list(islice((e for e in found if _fits(e, session)), limit))
    if not data.val_ratio:
        raise ConfigurationError(
            "there are no rows to judge on; give data.validation, or data.train and data.val_ratio."
        )
    fitting = [e for e in read_examples(_paths(data.train), "data.train", data) if _fits(e, session)]
    if len(fitting) < 2:
        raise ConfigurationError("data.val_ratio: one example cannot be split; give more rows or data.validation.")
    _, held_out = hold_out(len(fitting), data.val_ratio, session.config.training.seed)
    return [fitting[i] for i in held_out[:limit]]


def _fits(example: Example, session: Session) -> bool:
    return tokenize([example], session.preparation)[0] is not None


def _rows(run: RunFolder, session: Session, others: Sequence[str] | None) -> Iterator[Example]:
    data = session.config.data
    if others is not None:
        return read_examples(others, "data.validation", data)
    if data.val_ratio:
        held_out = set(run.read_metadata("held_out.json"))
        return (e for e in read_examples(_paths(data.train), "data.train", data) if e.id in held_out)
    if data.validation_sources:
        return read_examples(_paths(data.validation_sources), "data.validation", data)
    raise ConfigurationError(
        f"the run {run.run_id} had no validation rows to judge it on; give data.validation, or train with "
        "data.validation or data.val_ratio."
    )


def training_tokens(session: Session, at_least: int) -> list[int]:
    """The rows that the run trained on, rendered and one after the other, to so many tokens or their end.

    Raises:
        DatasetError: a source is missing or cannot be read.
    """
    data, tokens = session.config.data, list[int]()
    for example in read_examples(_paths(data.train), "data.train", data):
        row = tokenize([example], session.preparation)[0]
        tokens += row.input_ids.tolist() if row is not None else []
        if len(tokens) >= at_least:
            break
    return tokens


def _paths(sources: Sequence[object]) -> list[str]:
    return [str(source) for source in sources]
