"""A check on the characters that a run learns: rows of random letters, such as keys, hashes or a broken encoding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.columns import compute_offsets, count_by_example, mask_first_tokens
from training_lens.data.token_dataset import TokenDataset
from training_lens.measures.curves import MAD_TO_DEVIATION
from training_lens.training.preflight.row_scan import RowScan, name_rows

SAMPLED_ROWS = 20_000
LEAST_CHARACTERS = 24  # of an answer: fewer have no mean
LEAST_ROWS = 16  # with as many, to know what is usual
ROBUST_Z, LEAST_DEVIATION = 6.0, 0.1  # nats
EVEN = 3.2  # nats: the entropy of an answer's own characters, of 25 equally frequent ones; a language has about 2.9
MOST_OTHERS = 0.3  # share of characters beyond ASCII, spaces of byte-level tokens among them
SHARE = 0.01
ASCII, OTHERS = 128, 32  # classes of characters: those of ASCII, and all others by the remainder of their code
SMOOTHING = 4.0  # of the shorter context's prediction, in counts
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

RANDOM = Rule(
    code="random_text",
    signature="answers whose characters follow each other no better than if they were drawn one by one",
    threshold=f"a mean surprisal of the characters, given the two before, that is not below that without them, a "
    f"robust z over {ROBUST_Z:g} of the difference among the rows, and an entropy of the answer's own characters over "
    f"{EVEN:g} nats; a warning from {SHARE:.0%} of the rows on",
    source="relative to these rows: surprisal under the character counts of the other half of them; in natural "
    "language, code and numbers the two characters before help",
    action="look at the named rows: keys, hashes, a broken encoding or garbage; leave them out if nothing is to be "
    "learned from them",
)


@dataclass(frozen=True)
class CharacterTable:
    """The characters of each token of a vocabulary as classes: token i has those from offsets[i] to offsets[i + 1]."""

    classes: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocabulary: int) -> CharacterTable:
        """Of all tokens but the added ones, which are no text."""
        added = set(tokenizer.added_tokens_decoder)
        names = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
        texts = ["" if i in added or name is None else _spell_token(str(name)) for i, name in enumerate(names)]
        texts += [""] * (vocabulary - len(texts))
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        classes = np.where(codes < ASCII, codes, ASCII + codes % OTHERS).astype(np.int64)
        return cls(classes, compute_offsets(np.array([len(text) for text in texts], dtype=np.int64)))

    def spell(self, tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The classes of all characters of rows of tokens, and the offsets of the rows among them."""
        lengths = np.diff(self.offsets)[tokens]
        ends = compute_offsets(lengths)
        places = np.repeat(self.offsets[tokens] - ends[:-1], lengths) + np.arange(ends[-1])
        return self.classes[places], ends[offsets]


def _spell_token(name: str) -> str:
    """A token as text of one character a byte or letter: a byte's token is one character."""
    found = _BYTE.fullmatch(name)
    return chr(int(found[1], 16)) if found else name


class CharacterCounts:
    """Counts of characters, pairs and triples of rows, for predictions of other rows."""

    def __init__(self) -> None:
        size = ASCII + OTHERS
        self._triples = np.zeros(size**3, dtype=np.int32)

    def add(self, classes: np.ndarray, offsets: np.ndarray) -> None:
        """Count the triples within rows."""
        self._triples += np.bincount(_join_triples(classes, offsets)[0], minlength=len(self._triples)).astype(np.int32)

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Counts by character, by pair, by the pair that a triple begins with, and by the character of a pair."""
        size = ASCII + OTHERS
        pairs = self._triples.reshape(size, -1).sum(0)
        contexts = self._triples.reshape(-1, size).sum(1)
        return pairs.reshape(size, size).sum(0), pairs, contexts, pairs.reshape(size, size).sum(1)

    def measure_context_gain(self, classes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """How much the two characters before lower a character's surprisal, in nats, on average over each row.

        Formula: mean of ln p(c | a b) - ln p(c), with p(c | a b) = (n(abc) + k p(c | b)) / (n(ab) + k), and p(c | b) in
        the same way of p(c) = (n(c) + 1) / (N + classes). NaN for rows of fewer than `LEAST_CHARACTERS`.
        """
        size = ASCII + OTHERS
        triples, rows = _join_triples(classes, offsets)
        of_single, of_pair, of_context, of_middle = self._sums
        single = (of_single[triples % size] + 1) / (of_single.sum() + size)
        pair = (of_pair[triples % size**2] + SMOOTHING * single) / (of_middle[triples // size % size] + SMOOTHING)
        triple = (self._triples[triples] + SMOOTHING * pair) / (of_context[triples // size] + SMOOTHING)
        counts = np.bincount(rows, minlength=len(offsets) - 1)
        sums = np.bincount(rows, np.log(triple / single), minlength=len(offsets) - 1)
        return np.where(counts >= LEAST_CHARACTERS, sums / np.maximum(counts, 1), np.nan)


def _join_triples(classes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each three neighbouring characters of a row as a number, and the row of each."""
    size = ASCII + OTHERS
    triples = (classes[:-2] * size + classes[1:-1]) * size + classes[2:]
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    is_whole = rows[:-2] == rows[2:]
    return triples[is_whole], rows[2:][is_whole]


def check_random_text(scan: RowScan) -> Finding:
    """Whether answers of some rows are random characters."""
    places = scan.dataset.spread_positions(SAMPLED_ROWS)
    gains, is_even = _measure_gains(
        scan.dataset.select(places), CharacterTable.from_tokenizer(scan.tokenizer, len(scan.targets))
    )
    known = gains[np.isfinite(gains)]
    measured = f"{len(known):,} answers of at least {LEAST_CHARACTERS} characters"
    if len(known) < LEAST_ROWS:
        return RANDOM.report_fine("Too few long answers to look for random characters", measured, "likely")
    usual = float(np.median(known))
    deviation = max(MAD_TO_DEVIATION * float(np.median(np.abs(known - usual))), LEAST_DEVIATION)
    is_random = is_even & (gains <= 0) & (gains < usual - ROBUST_Z * deviation)
    measured += f"; the characters before one make it {np.exp(usual):.2g} times as likely, in the median row"
    if not is_random.any():
        return RANDOM.report_fine("No answer looks like random characters", measured, "likely", {"gain": usual})
    share, chosen = float(is_random.sum() / len(known)), np.zeros(len(scan.dataset), dtype=bool)
    chosen[places[is_random]] = True
    shown = scan.show_rows(chosen)
    return RANDOM.report_symptom(
        "warning" if share >= SHARE else "note",
        "Answers look like random characters",
        f"{int(is_random.sum()):,} of {measured}, and less likely in these: {name_rows(shown)}",
        evidence={"share": share, "gain": usual, "rows": shown},
    )


def _measure_gains(dataset: TokenDataset, table: CharacterTable) -> tuple[np.ndarray, np.ndarray]:
    """The context gain of each row's targets, each under the counts of the other half of the rows; and whether a row's
    own characters are spread evenly; (rows,) each.
    """
    is_even = np.zeros(len(dataset), dtype=bool)
    halves = np.random.Generator(np.random.PCG64(0)).permutation(len(dataset)) % 2
    counts, gains = (CharacterCounts(), CharacterCounts()), np.full(len(dataset), np.nan)
    for positions, classes, offsets in _spell_chunks(dataset, table):
        for half in (0, 1):
            counts[half].add(*_select_rows(classes, offsets, halves[positions] == half))
        is_even[positions] = _have_even_characters(classes, offsets)
    for positions, classes, offsets in _spell_chunks(dataset, table):
        for half in (0, 1):
            chosen = halves[positions] == half
            gains[positions[chosen]] = counts[1 - half].measure_context_gain(*_select_rows(classes, offsets, chosen))
    return gains, is_even


def _have_even_characters(classes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether the ASCII characters of each row are nearly equally frequent, and most of it; (rows,) bool."""
    rows, size = len(offsets) - 1, ASCII + OTHERS
    places = np.repeat(np.arange(rows), np.diff(offsets)) * size + classes
    counts = np.bincount(places, minlength=rows * size).reshape(rows, size)
    known = counts[:, :ASCII]
    shares = known / np.maximum(known.sum(1, keepdims=True), 1)
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(1)
    is_even: np.ndarray = (entropy > EVEN) & (known.sum(1) >= (1 - MOST_OTHERS) * counts.sum(1))
    return is_even


def _spell_chunks(dataset: TokenDataset, table: CharacterTable) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions of rows, the characters of their targets as classes, and the offsets of the rows among these."""
    for positions, chunk in dataset.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        offsets = compute_offsets(count_by_example(taught, chunk.offsets))
        yield positions, *table.spell(chunk.input_ids[taught], offsets)


def _select_rows(classes: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(offsets)
    return classes[np.repeat(chosen, lengths)], compute_offsets(lengths[chosen])
