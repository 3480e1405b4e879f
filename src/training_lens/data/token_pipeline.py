"""Rows to tokens: examples, rendered text and token ids, one chunk at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from training_lens.config.data_sections import DataSection
from training_lens.data.columns import EncodedRows, TokenizedRows, compute_offsets, find_learnable_rows, truncate_rows
from training_lens.data.examples import Example, TextSegment, TokenizedExample
from training_lens.data.notes import BadRowRule, DataNotes, bad_rows_error
from training_lens.data.row_identity import IDENTITY_COLUMNS, identify_example
from training_lens.data.source_reader import read_usable_examples, skip_bad_rows
from training_lens.data.sources import DataSource
from training_lens.data.split_report import SplitCounter
from training_lens.data.templates import Renderer
from training_lens.data.tokenization import CharacterCoverage, TextEncoder
from training_lens.errors import DatasetError
from training_lens.utils.files import hash_bytes
from training_lens.utils.prefetch import prefetch

CHUNK = 1000  # rows tokenized in one call; about five times as many are in memory


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the tokens, except the files."""

    data: DataSection
    renderer: Renderer
    encoder: TextEncoder
    seq_len: int
    tokenizer_hash: str


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the tokenizer's rules, special tokens and chat template."""
    rules = tokenizer.backend_tokenizer.to_str()
    text = json.dumps([rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)])
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(
    examples: Sequence[Example], preparation: Preparation, notes: DataNotes | None = None
) -> list[TokenizedExample | None]:
    """Tokenize examples; None for one that is dropped, or bad and skipped.

    Args:
        notes: collects the rows that are skipped, and remarks.

    Raises:
        DatasetError: the template or the tokenizer refuses a row; names it.
    """
    notes = notes or DataNotes()
    chunk, whole = _encode_chunk(_render_examples(examples, preparation, notes), preparation, notes)
    rows, kept = _select_rows(chunk, whole, preparation)
    kept_examples = (example for example, is_kept in zip(chunk.examples, kept.tolist(), strict=True) if is_kept)
    found = {id(example): row for example, row in zip(kept_examples, rows, strict=True)}
    return [found.get(id(example)) for example in examples]


def collect_example_errors(examples: Sequence[Example], preparation: Preparation) -> DatasetError | None:
    """One error that names all examples that the template or the tokenizer refuses; None if there are none."""
    skipping, notes = replace(preparation, data=skip_bad_rows(preparation.data)), DataNotes()
    left, _ = _encode_chunk(_render_examples(examples, skipping, notes), skipping, notes)
    return bad_rows_error(notes, Counter(example.file for example in left.examples))


def encode_training_prompt(example: Example, preparation: Preparation) -> list[int]:
    """The tokens before the example's last answer, truncated as in training."""
    prompt = preparation.encoder.encode_prompt(preparation.renderer.render_example_prompt(example))
    whole = preparation.encoder.encode([preparation.renderer.render_example(example)])[0]
    lost = len(whole.input_ids) - preparation.seq_len
    if lost <= 0 or preparation.data.truncation == "keep_start":
        return prompt
    front = 1 if prompt[0] == preparation.encoder.bos_id else 0
    return prompt[:front] + prompt[front + lost :]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some examples and their rendered text."""

    examples: list[Example]
    rendered: list[list[TextSegment]]


def tokenize_chunks(
    sources: Sequence[DataSource], preparation: Preparation, counter: SplitCounter, advance: Callable[[float], None]
) -> Iterator[TokenizedRows]:
    """The sources' tokens, chunk by chunk; reading, tokenizing (without the GIL) and selecting overlap."""
    left = float(sum(source.size_bytes for source in sources))
    examples = (e for source in sources for e in read_usable_examples(source, preparation.data, counter.notes))

    def render_chunks() -> Iterator[_Chunk]:
        while some := list(islice(examples, CHUNK)):
            yield _render_examples(some, preparation, counter.notes)

    def encode_chunks() -> Iterator[tuple[_Chunk, EncodedRows]]:
        for rendered in prefetch(render_chunks()):
            chunk, whole = _encode_chunk(rendered, preparation, counter.notes)
            counter.count_input(chunk.examples, chunk.rendered, whole)  # here, as it needs the tokenizer as well
            yield chunk, whole

    for chunk, whole in prefetch(encode_chunks()):
        yield _select_rows(chunk, whole, preparation, counter)[0]
        done = min(left, sum(len(message.text) for example in chunk.examples for message in example.messages))
        advance(done)
        left -= done
    advance(left)


def _render_examples(examples: Sequence[Example], preparation: Preparation, notes: DataNotes) -> _Chunk:
    """Render examples; if bad rows are skipped, without those that the template refuses."""
    rule, render = BadRowRule.from_data(preparation.data, notes), preparation.renderer.render_example
    rendered = [rule.try_row(e.file, e.row, partial(render, e, notes)) for e in examples]
    pairs = [(e, segments) for e, segments in zip(examples, rendered, strict=True) if segments is not None]
    return _Chunk([e for e, _ in pairs], [segments for _, segments in pairs])


def _encode_chunk(chunk: _Chunk, preparation: Preparation, notes: DataNotes) -> tuple[_Chunk, EncodedRows]:
    """Encode a chunk in one call; if that fails, one by one, to name the row or to skip it."""
    encode, rule = preparation.encoder.encode, BadRowRule.from_data(preparation.data, notes)
    try:
        return chunk, encode(chunk.rendered)
    except DatasetError:
        left = _Chunk([], [])
    for example, segments in zip(chunk.examples, chunk.rendered, strict=True):
        try:
            encode([segments])
            left.examples.append(example)
            left.rendered.append(segments)
        except DatasetError as error:
            named = DatasetError(f"{example.file}, row {example.row}: {error}")
            if not rule.skips:
                raise named from error
            rule.record_bad_row(example.file, example.row, named)
    return left, encode(left.rendered)


def _select_rows(
    chunk: _Chunk, whole: EncodedRows, preparation: Preparation, counter: SplitCounter | None = None
) -> tuple[TokenizedRows, np.ndarray]:
    """The truncated tokens of the kept examples, and which were kept, (examples,) bool; counts if asked."""
    data, encoder = preparation.data, preparation.encoder
    fitted = truncate_rows(whole, preparation.seq_len, data.truncation, encoder.bos_id)
    kept = find_learnable_rows(fitted, encoder.special_ids)
    left = fitted.select_tokens(np.repeat(kept, fitted.lengths))
    places = np.flatnonzero(kept).tolist()
    rows = TokenizedRows(
        left.input_ids,
        left.response if data.mask_prompt else np.ones_like(left.response),
        compute_offsets(left.lengths[kept]),
        [chunk.examples[i].file for i in places],
        np.array([chunk.examples[i].row for i in places], dtype=np.int64),
        [chunk.examples[i].domain for i in places],
        np.array([_hash_text(chunk.rendered[i]) for i in places], dtype=np.uint64),
        np.array([identify_example(chunk.examples[i]).columns for i in places], np.uint64).reshape(
            -1, IDENTITY_COLUMNS
        ),
    )
    if counter:
        counter.count_outcomes(chunk.examples, whole, fitted, kept)
        counter.count_kept_rows(rows)
    return rows, kept


def _hash_text(segments: Sequence[TextSegment]) -> int:
    """A hash of the text without its white space: rows that differ in it alone are duplicates, as for `prepare`."""
    text = "".join("".join(segment.text for segment in segments).split())
    return hash_bytes(text.encode())


def find_bad_rows(sources: Sequence[DataSource], preparation: Preparation) -> SplitCounter:
    """Counts and bad rows of all sources. Costs one full pass, whose tokens are discarded.

    Raises:
        DatasetError: a source itself is at fault, or has no readable row.
    """
    counter = SplitCounter(CharacterCoverage(preparation.encoder))
    skipping = replace(preparation, data=skip_bad_rows(preparation.data))
    deque(tokenize_chunks(sources, skipping, counter, lambda _: None), maxlen=0)
    return counter


def collect_all_errors(sources: Sequence[DataSource], preparation: Preparation) -> DatasetError | None:
    """All problems of the sources' rows, found by preparing them all; None if no row is at fault."""
    try:
        counter = find_bad_rows(sources, preparation)
    except DatasetError as error:
        return error
    return bad_rows_error(counter.notes, counter.usable)
