"""Rows that say the same: exactly, nearly, or the same question with another answer.

Rows are compared by what they say to the model: messages, calls and tools. 64-bit hashes are kept; among n rows two
different ones are taken for equal with probability n^2 / 2^65 (a million rows: 3e-8). They know nothing of domains:
the same text under two domains is a leak between splits. Duplicates are sought within a domain (`combine_digests`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from training_lens.data.examples import Example, Message

WORDS = 5  # in a shingle
_ANSWER = 0x5851F42D4C957F2D  # keeps the shingles of answers from those of prompts
RECALL = 0.9  # of pairs right at the threshold; more similar ones are found more surely
# Scripts that part words by no space: each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 2**64) for i in range(WORDS)], dtype=np.uint64)


def normalize_text(text: str) -> str:
    """The text in Unicode NFC, each stretch of white space as one space; case counts.

    Example:
        >>> normalize_text(" Two\\n words ")
        'Two words'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """64-bit hashes of an example: of all that it says (`whole`), of what comes before its last answer (`prompt`; of a
    plain text, the whole), and of its tools (`context`), which are part of the other two."""

    whole: int
    prompt: int
    context: int


def fingerprint_example(example: Example) -> Fingerprint:
    """The example's hashes, of texts as `normalize_text` gives them."""
    context = _hash_json(list(example.tools))
    turns = [_normalize_message(message) for message in example.messages]
    whole = _hash_json([context, turns])
    return Fingerprint(whole, whole if example.is_text else _hash_json([context, turns[:-1]]), context)


def _normalize_message(message: Message) -> list[Any]:
    muted = message.role == "assistant" and not message.learn
    return [message.role, normalize_text(message.text), normalize_text(message.input), message.calls_without_ids, muted]


def _hash_json(value: Any) -> int:
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def combine_digests(strata: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Digests that are equal where both are: what rows say, and their stratum; (rows,) uint64."""
    mixed: np.ndarray = digests ^ (strata * _POWERS[1])
    return mixed


def find_first_equal(digests: np.ndarray) -> np.ndarray:
    """For each row the position of the first that has its digest: its own where none is before it.

    Args:
        digests: (rows,) uint64.

    Example:
        >>> find_first_equal(np.array([7, 8, 7], dtype=np.uint64)).tolist()
        [0, 1, 0]
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse]
    return found


def find_conflicts(whole: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that answer otherwise than an earlier one of the same prompt, and for each the first of that prompt.

    Args:
        whole, prompt: (rows,) uint64, as in `Fingerprint`.
    """
    first = find_first_equal(prompt)
    rows = np.flatnonzero(whole != whole[first])
    return rows, first[rows]


@lru_cache(maxsize=2**16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def hash_shingles(messages: Sequence[Message], context: int = 0) -> np.ndarray:
    """32-bit hashes of every `WORDS` words in a row of the messages (all of shorter ones), sorted, each once; uint32.

    Words are of Unicode NFKC and without case; signs count as words, so 3 + 4 is not 3 - 4.

    Args:
        context: mixed into every hash: texts of different contexts share none.
    """
    text = " ".join(part for message in messages for part in _list_texts(message))
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return np.array([], dtype=np.uint32)
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    width = min(WORDS, len(words))
    windows = np.lib.stride_tricks.sliding_window_view(hashes, width)  # (words - width + 1, width)
    mixed = (windows * _POWERS[:width]).sum(axis=1, dtype=np.uint64) ^ np.uint64(context)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _list_texts(message: Message) -> Iterator[str]:
    yield from (message.text, message.input)
    yield from (json.dumps(call, ensure_ascii=False) for call in message.calls_without_ids)


def jaccard_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over that of the union, of two sorted sets; 1 where both are empty."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def choose_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Number and size of the bands that a signature is cut into; two rows are compared that agree on a whole band.

    That happens with probability 1 - (1 - J^size)^number (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets,
    section 3.4). The size is the largest with which it is at least `RECALL` at the threshold: the fewest vain
    comparisons.
    """
    sizes = range(num_perm // 2, 1, -1)
    found = (size for size in sizes if 1 - (1 - threshold**size) ** (num_perm // size) >= RECALL)
    size = next(found, 1)
    return num_perm // size, size


@dataclass(frozen=True, slots=True)
class Sketch:
    """What the index keeps of a row: the shingles of its prompt, those of its last answer, and the MinHash of both."""

    prompt: np.ndarray
    answer: np.ndarray
    minhash: Any

    @property
    def shingles(self) -> np.ndarray:
        """Those of prompt and answer, which share none."""
        return np.concatenate([self.prompt, self.answer])

    def similarity(self, other: Sketch, apart: bool) -> float:
        """The part of their shingles that both have (Jaccard); `apart`: of prompts or of answers, whichever is less.

        The latter is never above the former: |A and B| / |A or B| of two parts together lies between those of each.
        """
        if not apart:
            return jaccard_similarity(self.shingles, other.shingles)
        return min(jaccard_similarity(self.prompt, other.prompt), jaccard_similarity(self.answer, other.answer))


class NearIndex:
    """Finds rows that share at least `threshold` of their shingles (Jaccard) with a row that was put in.

    MinHash finds candidates, and the shingles themselves decide: none is found that is less similar. The same rows give
    the same answers, always.

    Cost: about 7 kB of memory a row put in, and 4 bytes for each of its words.
    """

    def __init__(self, threshold: float, num_perm: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        # The share of equal MinHashes estimates J; below this one, J reaches the threshold once in 30,000 times.
        self._hopeless = threshold - 4 * math.sqrt(threshold * (1 - threshold) / num_perm)
        self._lsh = MinHashLSH(num_perm=num_perm, params=choose_bands(threshold, num_perm))
        self._empty = MinHash(num_perm, hashfunc=int)  # shingles are hashes already
        self._sketches: dict[int, Sketch] = {}

    def build_sketch(self, example: Example, context: int) -> Sketch:
        """The example as `find_near_rows` and `add_row` take it."""
        *asked, answer = example.messages
        parts = hash_shingles(asked, context), hash_shingles([answer], context ^ _ANSWER)
        minhash = self._empty.copy()
        minhash.update_batch(np.concatenate(parts))
        return Sketch(*parts, minhash)

    def add_row(self, row: int, sketch: Sketch) -> None:
        """Put a row in; one without any word is never near another."""
        if len(sketch.shingles):
            self._lsh.insert(row, sketch.minhash)
            self._sketches[row] = sketch

    def find_near_rows(self, sketch: Sketch, apart: bool = False) -> Iterator[tuple[int, float]]:
        """The near rows in the order of their numbers, each with its similarity.

        Args:
            apart: as in `Sketch.similarity`; prompts are near, and answers are.
        """
        for row in self._find_candidates(sketch) if len(sketch.shingles) else ():
            similar = self._sketches[row].similarity(sketch, apart)
            if similar >= self._threshold:
                yield row, similar

    def _find_candidates(self, sketch: Sketch) -> list[int]:
        """Rows that agree on a band, without those of which the whole signatures differ too much."""
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
    """Rows that are near an earlier one that is kept: position -> that one's, and how similar they are.

    Prompts are compared with prompts, answers with answers. Rows that ask exactly the same are not near, as they
    answer otherwise, if only by a word.

    Args:
        wanted: (rows,) bool; the others are passed over.
        prompt: (rows,) uint64, as in `Fingerprint`.
        index: an empty one; the rows that are kept are put in.
    """
    found: dict[int, tuple[int, float]] = {}
    for position, example, context in rows():
        if not wanted[position]:
            continue
        sketch = index.build_sketch(example, context)
        near = next(
            (other for other in index.find_near_rows(sketch, apart=True) if prompt[other[0]] != prompt[position]), None
        )
        if near:
            found[position] = near
        else:
            index.add_row(position, sketch)
    return found
