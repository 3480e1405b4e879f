"""One pass over the tokens of a split: what every row teaches, and how it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_lens.data.columns import EncodedRows, count_by_example, mask_first_tokens
from training_lens.data.token_dataset import TokenDataset

ENDING = 4  # tokens at the end of an answer among which its end token is: templates put a line break behind it
SHOWN_ROWS, SHOWN_TEXT, SHOWN_TOKENS = 3, 120, 24


@dataclass(frozen=True)
class RowScan:
    """What the tokens of a split say of its rows.

    Of each row: `is_asked`, it has a prompt; `is_whole`, all its tokens are learned, as of a plain text; `is_ended`, an
    end token is among its last targets; `pads`, pad tokens among its targets. `targets` counts each token of the
    vocabulary among the targets of all rows.
    """

    dataset: TokenDataset
    tokenizer: Any
    is_asked: np.ndarray
    is_whole: np.ndarray
    is_ended: np.ndarray
    pads: np.ndarray
    targets: np.ndarray

    def show_rows(self, chosen: np.ndarray) -> list[dict[str, str]]:
        """The first of the rows where `chosen` (rows,) is true: id, and the end of prompt and of answer as text."""
        return [self.show_row(int(position)) for position in np.flatnonzero(chosen)[:SHOWN_ROWS]]

    def show_row(self, position: int) -> dict[str, str]:
        """The id of a row, the end of its prompt, and its last targets."""
        example = self.dataset[position]
        learned = np.flatnonzero(example.loss_mask)
        start = int(learned[0]) if len(learned) else len(example.input_ids)
        prompt = self._decode_end(example.input_ids[:start])
        return {"row": example.id, "prompt": prompt, "learned": self._decode_end(example.input_ids[example.loss_mask])}

    def _decode_end(self, ids: np.ndarray) -> str:
        text = str(self.tokenizer.decode(ids[-SHOWN_TOKENS:], clean_up_tokenization_spaces=False)).lstrip("\ufffd")
        return text if len(text) <= SHOWN_TEXT else f"...{text[-SHOWN_TEXT:]}"


def name_rows(shown: Sequence[dict[str, str]]) -> str:
    """The rows of `show_rows` in a sentence: 'train.jsonl:3 (learned: ...)'."""
    return "; ".join(f"{row['row']} (learned: {row['learned']!r})" for row in shown)


def end_token_ids(tokenizer: Any) -> set[int | None]:
    """The tokens that may end an answer: EOS and all added tokens but those for padding, beginning and the unknown."""
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return ({int(i) for i in tokenizer.added_tokens_decoder} - others) | {tokenizer.eos_token_id}


def scan_rows(
    dataset: TokenDataset, tokenizer: Any, vocabulary: int, new_ids: Collection[int] = frozenset()
) -> RowScan:
    """Scan all tokens, chunk by chunk. Cost: some numpy operations a chunk, no decoding.

    Args:
        new_ids: of added tokens that end no answer: data.new_tokens.
    """
    rows = len(dataset)
    flags = {name: np.zeros(rows, dtype=bool) for name in ("is_whole", "is_ended")}
    pads = np.zeros(rows, dtype=np.int64)
    is_end = _mark_ids(end_token_ids(tokenizer) - set(new_ids), vocabulary)
    is_pad = _mark_ids({tokenizer.pad_token_id}, vocabulary)
    targets = np.zeros(vocabulary, dtype=np.int64)
    for positions, chunk in dataset.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        learned = count_by_example(taught, chunk.offsets)
        flags["is_whole"][positions] = (learned == chunk.lengths - 1) & (learned > 0)
        flags["is_ended"][positions] = _find_endings(chunk, taught, is_end)
        pads[positions] = count_by_example(is_pad[chunk.input_ids] & taught, chunk.offsets)
        targets += np.bincount(chunk.input_ids[taught], minlength=vocabulary)
    return RowScan(dataset, tokenizer, dataset.identities[:, 1] != 0, **flags, pads=pads, targets=targets)


def _mark_ids(ids: set[int | None], vocabulary: int) -> np.ndarray:
    marks = np.zeros(vocabulary, dtype=bool)
    marks[[i for i in ids if i is not None and i < vocabulary]] = True
    return marks


def _find_endings(chunk: EncodedRows, taught: np.ndarray, is_end: np.ndarray) -> np.ndarray:
    """Whether an end token is among the last `ENDING` targets of each row, (rows,) bool."""
    places = np.where(taught, np.arange(len(taught)), -1)
    last = np.maximum.reduceat(places, chunk.offsets[:-1]) if len(chunk) else np.array([], dtype=np.int64)
    ended = np.zeros(len(chunk), dtype=bool)
    for back in range(ENDING):
        place = np.maximum(last - back, chunk.offsets[:-1])
        ended |= is_end[chunk.input_ids[place]] & taught[place]
    return ended
