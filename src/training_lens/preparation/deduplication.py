"""Duplicates within a set of rows, and leaks: rows of one split that another split repeats.

Rows are compared by what the model sees: messages, calls and tools, as 64-bit hashes. Among n rows, a collision has
probability n^2 / 2^65 (a million rows: 3e-8). The hashes exclude domains, since the same text under two domains is a
leak between splits. Duplicates are found within a domain (`combine_digests`). Duplicates are exact, near, or the same
prompt with different answers; leaks are also found where only case, punctuation or leading words differ
(`data.row_identity`). Metrics on leaks do not measure generalization.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np

from training_lens.data.examples import Example, Message
from training_lens.data.row_identity import find_same_questions, find_same_rows
from training_lens.utils.files import hash_bytes

MatchKind = Literal["exact", "normalized", "prompt", "near"]
MATCH_KINDS: tuple[MatchKind, ...] = ("exact", "normalized", "prompt", "near")  # the strongest first
DROPPED = -1  # split index of rows that are in no split
WORDS = 5  # in a shingle
_ANSWER = 0x5851F42D4C957F2D  # separates the shingles of answers from those of prompts
RECALL = 0.9  # of pairs exactly at the threshold; higher for more similar pairs
# Scripts without spaces between words: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_FOLDED_ASCII_WORD = re.compile(r"[0-9_a-z]+|[^\s0-9_a-z]")  # the same for such a text, in less time
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(WORDS)], dtype=np.uint64)
_encode_json = json.JSONEncoder(sort_keys=True).encode
_SEEN = 2**24  # bytes of a `NearIndex` that tell which shingles occur in it


def normalize_text(text: str) -> str:
    """The text in Unicode NFC with collapsed white space; case is kept.

    Example:
        >>> normalize_text(" Two\\n words ")
        'Two words'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """64-bit hashes of an example: of all of it (`whole`), of everything before its last answer (`prompt`; for a plain
    text, the whole), and of its tools (`context`), which the other two include."""

    whole: int
    prompt: int
    context: int


def fingerprint_example(example: Example) -> Fingerprint:
    """The example's hashes, of texts as `normalize_text` gives them."""
    context = _hash_json(list(example.tools))
    turns = []
    for m in example.messages:
        muted = m.role == "assistant" and not m.learn
        turns.append([m.role, normalize_text(m.text), normalize_text(m.input), m.calls_without_ids, muted])
    whole = _hash_json([context, turns])
    return Fingerprint(whole, whole if example.is_text else _hash_json([context, turns[:-1]]), context)


def _hash_json(value: Any) -> int:
    return hash_bytes(_encode_json(value).encode())


def combine_digests(strata: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Mix each row's digest with its stratum, so that only rows of one stratum are equal; (rows,) uint64."""
    mixed: np.ndarray = digests ^ (strata * _POWERS[1])
    return mixed


def find_first_equal(digests: np.ndarray) -> np.ndarray:
    """For each row, the position of the first row with its digest (its own if none is earlier).

    Example:
        >>> find_first_equal(np.array([7, 8, 7], dtype=np.uint64)).tolist()
        [0, 1, 0]
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return np.take(first, inverse)


def find_conflicts(whole: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that answer differently than an earlier row with the same prompt, and the first row of each prompt.

    `whole` and `prompt` (rows,) uint64 are as in `Fingerprint`.
    """
    first = find_first_equal(prompt)
    rows = np.flatnonzero(whole != whole[first])
    return rows, first[rows]


@lru_cache(maxsize=2**16)
def _word_hash(word: str) -> int:
    return hash_bytes(word.encode("utf-8", "surrogatepass"))


def hash_shingles(messages: Sequence[Message], context: int = 0) -> np.ndarray:
    """32-bit hashes of all `WORDS`-grams of words (one for shorter texts), sorted and unique; uint32.

    Words are NFKC-normalized and case-folded; signs count as words, so 3 + 4 is not 3 - 4. The `context` is mixed into
    every hash, so that different contexts share none.
    """
    text = " ".join(part for message in messages for part in _list_texts(message))
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = (_FOLDED_ASCII_WORD if folded.isascii() else _WORD).findall(folded)
    if not words:
        return np.array([], dtype=np.uint32)
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    powers = _POWERS[: len(words)]
    mixed = np.convolve(hashes, powers[::-1], "valid") ^ np.uint64(context)  # (words - len(powers) + 1,)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _list_texts(message: Message) -> Iterator[str]:
    yield from (message.text, message.input)
    yield from (json.dumps(call, ensure_ascii=False) for call in message.calls_without_ids)


def jaccard_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted sets; 1 if both are empty."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def choose_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Number and size of the LSH bands of a signature; rows that agree on a whole band are compared.

    That happens with probability 1 - (1 - J^size)^number (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets,
    section 3.4). The size is the largest with a probability of at least `RECALL` at the threshold, which gives the
    fewest needless comparisons.
    """
    sizes = range(num_perm // 2, 1, -1)
    found = (size for size in sizes if 1 - (1 - threshold**size) ** (num_perm // size) >= RECALL)
    size = next(found, 1)
    return num_perm // size, size


@dataclass(frozen=True)
class Sketch:
    """What of a row is compared: the shingles of its prompt and of its last answer; `empty` is a MinHash of none."""

    prompt: np.ndarray
    answer: np.ndarray
    empty: Any

    @cached_property
    def minhash(self) -> Any:
        """The MinHash of all shingles. Takes most of a sketch's time, and most rows do not need it."""
        filled = self.empty.copy()
        filled.update_batch(self.all_shingles.tolist())
        return filled

    @property
    def all_shingles(self) -> np.ndarray:
        """The shingles of prompt and answer, which are disjoint."""
        return np.concatenate([self.prompt, self.answer])

    def similarity(self, other: Sketch, apart: bool) -> float:
        """Jaccard similarity; with `apart`, the lower one of prompts and of answers.

        The latter is never higher: the similarity of two disjoint parts together lies between those of each part.
        """
        if not apart:
            return jaccard_similarity(self.all_shingles, other.all_shingles)
        return min(jaccard_similarity(self.prompt, other.prompt), jaccard_similarity(self.answer, other.answer))


class NearIndex:
    """Finds rows whose Jaccard similarity with an indexed row is at least `threshold`.

    MinHash finds candidates and the exact similarity decides, so there are no false positives. Deterministic. A row
    with too few shingles that any indexed row may have (a Bloom filter of one hash) is near none, and costs no MinHash.

    Cost: about 7 kB of memory per indexed row, plus 4 bytes per word, and 16 MB.
    """

    def __init__(self, threshold: float, num_perm: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        # The share of equal MinHashes estimates J; below this share, J reaches the threshold once in 30,000 cases.
        self._hopeless = threshold - 4 * math.sqrt(threshold * (1 - threshold) / num_perm)
        self._lsh = MinHashLSH(num_perm=num_perm, params=choose_bands(threshold, num_perm))
        self._empty = MinHash(num_perm, hashfunc=int)  # shingles are hashes already
        self._sketches: dict[int, Sketch] = {}
        self._seen = np.zeros(_SEEN, dtype=bool)  # by the last bits of a shingle

    def build_sketch(self, example: Example, context: int) -> Sketch:
        """The example as `find_near_rows` and `add_row` take it."""
        *asked, answer = example.messages
        return Sketch(hash_shingles(asked, context), hash_shingles([answer], context ^ _ANSWER), self._empty)

    def add_row(self, row: int, sketch: Sketch) -> None:
        """Index a row; a row without words is never near another."""
        if len(sketch.all_shingles):
            self._lsh.insert(row, sketch.minhash)
            self._sketches[row] = sketch
            self._seen[sketch.all_shingles & (_SEEN - 1)] = True

    def find_near_rows(self, sketch: Sketch, apart: bool = False) -> Iterator[tuple[int, float]]:
        """The near rows in order, each with its similarity; `apart`: prompts are near, and answers are."""
        for row in self._find_candidates(sketch) if self._may_be_near(sketch) else ():
            similar = self._sketches[row].similarity(sketch, apart)
            if similar >= self._threshold:
                yield row, similar

    def _may_be_near(self, sketch: Sketch) -> bool:
        """False where even a row of all shingles that are known here would not be near: |A and B| / |A| is too low."""
        shingles = sketch.all_shingles
        shared = int(np.count_nonzero(self._seen[shingles & (_SEEN - 1)]))
        return len(shingles) > 0 and shared / len(shingles) >= self._threshold

    def _find_candidates(self, sketch: Sketch) -> list[int]:
        """Rows that agree on a band, unless their whole signatures differ too much."""
        rows = sorted(self._lsh.query(sketch.minhash))
        if not rows:
            return []
        signatures = np.stack([self._sketches[row].minhash.hashvalues for row in rows])  # (candidates, num_perm)
        equal = (signatures == sketch.minhash.hashvalues).mean(axis=1)
        return [row for row, share in zip(rows, equal.tolist(), strict=True) if share >= self._hopeless]


Rows = Callable[[], Iterable[tuple[int, Example, int]]]  # position, example and context of every row, from the start


def find_near_duplicates(
    rows: Rows, wanted: np.ndarray, prompt: np.ndarray, index: NearIndex
) -> dict[int, tuple[int, float]]:
    """Rows near an earlier kept row: position -> (position of that row, similarity).

    Prompts are compared with prompts, answers with answers. Rows with exactly the same prompt are not near: they
    answer differently, if only by a word.

    Args:
        wanted: (rows,) bool; other rows are skipped.
        prompt: (rows,) uint64, as in `Fingerprint`.
        index: an empty index; kept rows are added.
    """
    found: dict[int, tuple[int, float]] = {}
    for position, example, context in rows():
        if not wanted[position]:
            continue
        sketch = index.build_sketch(example, context)
        similar = index.find_near_rows(sketch, apart=True)
        near = next((other for other in similar if prompt[other[0]] != prompt[position]), None)
        if near:
            found[position] = near
        else:
            index.add_row(position, sketch)
    return found


@dataclass(frozen=True, slots=True)
class RowMatch:
    """The positions of a `row` and of the `other` that it repeats: an earlier row, or one of another split.

    `kind`: exact (all equal), normalized (equal as `row_identity` compares rows), prompt (equal prompt, different
    answer), near (similar).
    """

    kind: MatchKind
    row: int
    other: int
    similarity: float = 1.0


def find_equal_leaks(whole: np.ndarray, prompt: np.ndarray, split: np.ndarray, train: int) -> list[RowMatch]:
    """Rows that an earlier split repeats, in whole or in their prompt; one leak per row, the stronger, in row order.

    Args:
        whole, prompt: (rows,) uint64, as in `Fingerprint`.
        split: (rows,) index of each row's split, or `DROPPED`.
        train: the index of the training split, which counts as the last.
    """
    found = {row: RowMatch("prompt", row, other) for row, other in _find_partners(prompt, split, train).items()}
    found |= {row: RowMatch("exact", row, other) for row, other in _find_partners(whole, split, train).items()}
    return [found[row] for row in sorted(found)]


def find_normalized_leaks(identities: np.ndarray, split: np.ndarray, train: int) -> list[RowMatch]:
    """Training rows that a held-out row repeats as `row_identity` compares them, in whole or in their question.

    Args:
        identities: (rows, IDENTITY_COLUMNS) uint64.
        split, train: as for `find_equal_leaks`.
    """
    rows, held = np.flatnonzero(split == train), np.flatnonzero((split != train) & (split != DROPPED))
    found: dict[int, RowMatch] = {}
    kinds: tuple[MatchKind, ...] = ("prompt", "normalized")
    for kind, find in zip(kinds, (find_same_questions, find_same_rows), strict=True):
        partner = find(identities[held], identities[rows])
        found |= {
            int(rows[i]): RowMatch(kind, int(rows[i]), int(held[partner[i]])) for i in np.flatnonzero(partner >= 0)
        }
    return list(found.values())


def join_leaks(*leaks: Iterable[RowMatch]) -> list[RowMatch]:
    """One leak per row, the strongest, in row order; of equally strong ones the first given."""
    found: dict[int, RowMatch] = {}
    for leak in chain.from_iterable(leaks):
        if leak.row not in found or MATCH_KINDS.index(leak.kind) < MATCH_KINDS.index(found[leak.row].kind):
            found[leak.row] = leak
    return [found[row] for row in sorted(found)]


def _find_partners(digests: np.ndarray, split: np.ndarray, train: int) -> dict[int, int]:
    """Rows whose digest first occurs in another split -> the first row with it."""
    rank = np.where(split == train, split.max(initial=0) + 1, split)
    order = np.lexsort((np.arange(len(split)), rank))
    order = order[split[order] != DROPPED]
    partner = order[find_first_equal(digests[order])]
    other = split[partner] != split[order]
    return dict(zip(order[other].tolist(), partner[other].tolist(), strict=True))


def find_near_leaks(rows: Rows, split: np.ndarray, train: int, index: NearIndex) -> list[RowMatch]:
    """Rows near one of another split, as `find_equal_leaks`. Reads all rows twice; held-out ones fill the index."""
    leaks: list[RowMatch] = []
    for training in (False, True):
        for position, example, context in rows():
            if split[position] == DROPPED or (split[position] == train) != training:
                continue
            sketch = index.build_sketch(example, context)
            other = next((found for found in index.find_near_rows(sketch) if split[found[0]] != split[position]), None)
            if other:
                leaks.append(RowMatch("near", position, *other))
            if not training:
                index.add_row(position, sketch)
    return leaks
