"""Rows as one session evaluates them: tokens, prompts, answers, bytes of text; which of them it was trained on.

Where the user has no general text to measure forgetting on, the base samples some by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.run_config import locate_outputs
from training_lens.config.schema import TrainingConfig
from training_lens.data.batching import limit_examples
from training_lens.data.examples import Example, Message, TokenizedExample
from training_lens.data.leaks import LEAK_TEXTS, find_leaks
from training_lens.data.sources import expand_sources
from training_lens.data.token_cache import prepare_sources
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation, encode_training_prompt, tokenize
from training_lens.display.progress import Progress
from training_lens.errors import DatasetError, TrainingLensError
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import hash_bytes
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
TEXTS, TOKENS = 64, 128  # so many, of at most so many tokens


@dataclass(frozen=True)
class EvaluationRows:
    """Rows that fit the session's model; `kept` are their indices among those given.

    `prompts` are the tokens before each row's last answer. They are None for a plain text, and where the row is too
    long to leave any prompt, or any position for an answer. `references` are the texts of the last answers.
    `text_bytes` (int64) are the UTF-8 bytes of each row's supervised text, `tokens_id` (uint64) is a hash of its
    supervised tokens.
    """

    examples: list[Example]
    kept: np.ndarray
    dataset: TokenDataset
    prompts: list[list[int] | None]
    references: list[str]
    text_bytes: np.ndarray
    tokens_id: np.ndarray

    @classmethod
    def from_examples(cls, examples: Sequence[Example], session: Session) -> EvaluationRows:
        """The rows of `examples` that fit the model.

        Raises:
            DatasetError: none fits.
        """
        tokenized = tokenize(examples, session.preparation)
        kept = np.array([i for i, tokens in enumerate(tokenized) if tokens is not None], dtype=np.int64)
        if not len(kept):
            raise DatasetError(
                f"none of the {len(examples)} rows to evaluate has an answer within model.seq_len="
                f"{session.preparation.seq_len} tokens of {session.source}; give other rows."
            )
        fitting = [t for t in tokenized if t is not None]
        kept_examples = [examples[i] for i in kept]
        prompts = [_build_prompt(example, session) for example in kept_examples]
        silent = [e.id for e, p in zip(kept_examples, prompts, strict=True) if p is None and not e.is_text]
        if silent:
            logger.warning(
                "%d rows are evaluated by their loss alone: their answers leave no room for a prompt, or their prompts "
                "none for an answer; the first is %s", len(silent), silent[0],
            )  # fmt: skip
        texts = [_read_texts(e, tokens, session) for e, tokens in zip(kept_examples, fitting, strict=True)]
        return cls(
            kept_examples,
            kept,
            TokenDataset.from_examples(fitting),
            prompts,
            [reference for reference, _ in texts],
            np.array([size for _, size in texts], dtype=np.int64),
            np.array([hash_bytes(t.input_ids[t.loss_mask].tobytes()) for t in fitting], dtype=np.uint64),
        )

    def take(self, places: np.ndarray) -> EvaluationRows:
        """The rows at these indices, in this order."""
        return EvaluationRows(
            [self.examples[i] for i in places],
            self.kept[places],
            self.dataset.select(places),
            [self.prompts[i] for i in places],
            [self.references[i] for i in places],
            self.text_bytes[places],
            self.tokens_id[places],
        )

    def count_distinct(self) -> int:
        """How many rows differ in their tokens."""
        return len({example.input_ids.tobytes() for example in self.dataset})

    @property
    def prompt_references(self) -> list[str]:
        """The right answers of the rows with a prompt."""
        return [self.references[i] for i in np.flatnonzero(self.has_prompt)]

    @property
    def has_prompt(self) -> np.ndarray:
        """Which rows have a prompt, (rows,) bool."""
        return np.array([prompt is not None for prompt in self.prompts], dtype=bool)


def _build_prompt(example: Example, session: Session) -> list[int] | None:
    """The prompt as training truncates it; None where nothing of it is left, or no position for an answer."""
    if example.is_text:
        return None
    ids = encode_training_prompt(example, session.preparation)
    nothing = all(token == session.encoder.bos_id for token in ids)
    return None if nothing or (session.positions and len(ids) >= session.positions) else ids


def _read_texts(example: Example, kept: TokenizedExample, session: Session) -> tuple[str, int]:
    """The text of the last answer, with tool calls as in the template, and the UTF-8 bytes of the supervised text.

    Special tokens have no bytes. Of a truncated row, the bytes are those of its tokens' text.
    """
    segments = session.renderer.render_example(example)
    whole = session.encoder.encode([segments])[0]
    reference = example.messages[-1].text
    if example.messages[-1].calls:
        reference = _masked_texts(whole.input_ids, whole.response, session)[-1]
    if len(kept.input_ids) < len(whole.input_ids):
        return reference, sum(len(text.encode()) for text in _masked_texts(kept.input_ids, kept.loss_mask, session))
    size = 0
    for segment in segments:
        if segment.response or not session.config.data.mask_prompt:
            text = segment.text
            for name in () if segment.plain else session.tokenizer.all_special_tokens:  # in plain text, ordinary text
                text = text.replace(name, "")
            size += len(text.encode())
    return reference, size


def _masked_texts(ids: np.ndarray, mask: np.ndarray, session: Session) -> list[str]:
    """The text of each contiguous run of tokens that the mask marks."""
    runs = groupby(range(len(ids)), key=lambda i: bool(mask[i]))
    marked = [ids[list(places)].tolist() for is_marked, places in runs if is_marked]
    return [str(session.tokenizer.decode(run, skip_special_tokens=True)) for run in marked]


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


def sample_base_text(session: Session, seed: int, progress: Progress) -> EvaluationRows:
    """Texts that the base continues from its start token alone, at temperature 1; every sampled token is supervised.

    The start token is the tokenizer's BOS, or its EOS, which separates documents in training. The base's loss on them
    estimates its own entropy, and another model's excess over it the KL from the base to that model.

    Raises:
        DatasetError: the base ends every text at once.
    """
    bos = session.encoder.bos_id
    start = session.encoder.eos_id if bos is None else bos
    settings = InferenceSection(temperature=1.0, max_new_tokens=TOKENS, seed=seed)
    with progress.task("general text from the base", TEXTS) as advance:
        sampled = generate_answers(session, [[start]] * TEXTS, settings, base=True, advance=advance)
    texts = [(answer.text, list(answer.token_ids)) for answer in sampled if answer.token_ids]
    if not texts:
        raise DatasetError("the base ends every text at once when it samples; give general text: --general FILE.")
    ids = [np.array([start, *tokens], np.int32) for _, tokens in texts]
    masks = [np.arange(len(row)) > 0 for row in ids]
    names = [
        Example((Message("assistant", text),), None, "sampled", i, is_text=True) for i, (text, _) in enumerate(texts)
    ]
    rows = [
        TokenizedExample("sampled", i, row, mask, None) for i, (row, mask) in enumerate(zip(ids, masks, strict=True))
    ]
    return EvaluationRows(
        names,
        np.arange(len(rows)),
        TokenDataset.from_examples(rows),
        [None] * len(rows),
        [text for text, _ in texts],
        np.array([len(text.encode()) for text, _ in texts], dtype=np.int64),
        np.array([hash_bytes(row[1:].tobytes()) for row in ids], dtype=np.uint64),
    )
