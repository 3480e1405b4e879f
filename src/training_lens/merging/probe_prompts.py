"""Real rows to compare two forms of one model on, and what the adapter computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from training_lens.data.examples import Example
from training_lens.data.source_reader import read_examples
from training_lens.data.token_pipeline import encode_training_prompt, tokenize
from training_lens.errors import ConfigurationError
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session
from training_lens.merging.merge_tensors import scale_update
from training_lens.merging.reload import decode_greedily, last_logits
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder

ROWS = 16
TOKENS = 256  # of a row at most, from its start
ANSWERS = 8  # prompts that are answered
ANSWER_TOKENS = 32
LOGIT_BYTES = 256 * 2**20  # kept for each model: with a large vocabulary only a row's last positions are compared


@dataclass(frozen=True)
class Probes:
    """Rows of tokens, and prompts, each with its `max_new_tokens`.

    `origin` says where the rows are from, for messages; the last `keep` positions of each row are compared.
    """

    rows: list[list[int]]
    prompts: list[tuple[list[int], int]]
    keep: int
    origin: str


@dataclass(frozen=True)
class Reference:
    """What the adapter computes: logits of each row, with it and of the base alone, and greedy answers.

    `margins` are those of `reload.decode_greedily`.
    """

    adapter: list[Tensor]
    base: list[Tensor]
    answers: list[list[int]]
    margins: list[list[float]]


def read_run_rows(run: RunFolder, session: Session, others: Sequence[str] | None) -> tuple[list[Example], str]:
    """Rows of a run, and where they are from: `others`, its validation rows, or without these its training rows."""
    if others:
        return validation_examples(run, session, ROWS, others), f"of {', '.join(others)}"
    try:
        return validation_examples(run, session, ROWS), "of the run's validation data"
    except ConfigurationError:
        train = [str(source) for source in session.config.data.train]
        return validation_examples(run, session, ROWS, train), "that the run was trained on"


def read_config_rows(session: Session) -> tuple[list[Example], str]:
    """Rows that the session's config names, for an adapter without a run."""
    data = session.config.data
    sources = [str(source) for source in data.validation_sources or data.train]
    examples = (e for e in read_examples(sources, "data.validation", data) if _is_usable(e, session))
    return list(islice(examples, ROWS)), f"of {', '.join(sources)}"


def _is_usable(example: Example, session: Session) -> bool:
    return tokenize([example], session.preparation)[0] is not None


def build_probes(session: Session, examples: Sequence[Example], origin: str) -> Probes:
    """The examples as tokens: whole, and as prompts. The prompt of a plain text is its first half.

    Raises:
        ConfigurationError: no examples.
    """
    if not examples:
        raise ConfigurationError(
            f"there are no rows {origin} to check the merge on; give data.validation=FILE with rows of the kind that "
            "the adapter was trained on."
        )
    tokens = tokenize(list(examples), session.preparation)
    whole = [[int(i) for i in t.input_ids[:TOKENS]] for t in tokens if t is not None]
    prompts = [
        ids[: len(ids) // 2] if e.is_text else encode_training_prompt(e, session.preparation)
        for e, ids in zip(examples[:ANSWERS], whole, strict=False)
    ]
    room = [min(ANSWER_TOKENS, session.positions - len(ids)) if session.positions else ANSWER_TOKENS for ids in prompts]
    vocabulary = session.model.config.get_text_config().vocab_size
    keep = max(1, min(TOKENS, LOGIT_BYTES // (4 * vocabulary * len(whole))))
    return Probes(whole, [(ids, n) for ids, n in zip(prompts, room, strict=True) if ids and n > 0], keep, origin)


def compute_reference(session: Session, given: Probes, scale: float = 1.0) -> Reference:
    """What the session's adapter computes for the probes, its update times `scale`, and the base alone."""
    model = session.model
    with base_only(model):
        base = [last_logits(model, ids, given.keep) for ids in given.rows]
    stops = {"eos_token_id": sorted(session.stop_ids), "pad_token_id": session.pad_id}
    with scale_update(model, scale):
        adapter = [last_logits(model, ids, given.keep) for ids in given.rows]
        answers = [decode_greedily(model, ids, limit, **stops) for ids, limit in given.prompts]
    return Reference(adapter, base, [tokens for tokens, _ in answers], [margins for _, margins in answers])
