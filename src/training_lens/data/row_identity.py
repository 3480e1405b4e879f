"""What makes two rows the same question or the same answer, whatever their case, white space and punctuation.

The one place where this is decided: `train`, `validate`, `prepare`, `evaluate` and `compare` count leaks by it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.data.examples import Example, Message
from training_lens.utils.files import hash_bytes

LEADING_WORDS = 3  # a question is the same with so many words before it: "So, ...", "Please tell me ..."
FEWEST_WORDS = 4  # that must follow them
IDENTITY_COLUMNS = LEADING_WORDS + 2
NO_IDENTITY = (0,) * IDENTITY_COLUMNS
_MIX = np.uint64(0x9E3779B97F4A7C15)
# Signs around words; those inside count, as do signs of their own: 3 + 4 is not 3 - 4, and .5 is not 5.
OPENING_SIGNS = "\"'()[]{}«»“”‘’„「」『』¿¡"  # noqa: RUF001 (quotation marks of several languages)
END_SIGNS = f".,;:!?…、。{OPENING_SIGNS}"  # NFKC has made the full-width ones of these


def normalize_words(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, without signs at their ends.

    Example:
        >>> normalize_words(' So, how  many are 3.5 + 1?')
        ['so', 'how', 'many', 'are', '3.5', '+', '1']
    """
    folded = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return [word for each in folded.split() if (word := each.rstrip(END_SIGNS).lstrip(OPENING_SIGNS))]


@dataclass(frozen=True, slots=True)
class RowIdentity:
    """64-bit hashes of an example.

    `answer`: of the last answer. `questions`: of what comes before it, whole and without its first words, as long as
    `FEWEST_WORDS` are left; all 0 for a plain text, which asks nothing.
    """

    answer: int
    questions: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """As stored beside the tokens: the answer, then the questions."""
        return (self.answer, *self.questions)


def identify_example(example: Example) -> RowIdentity:
    """The example's hashes. Domains are left out: the same question of another domain is the same."""
    *asked, last = example.messages
    answer = _hash_words(_list_words([last]), b"")
    if example.is_text:
        return RowIdentity(answer, (0,) * (LEADING_WORDS + 1))
    *earlier, question = asked or [last]
    context = json.dumps([[m.role, _list_words([m])] for m in earlier] + [list(example.tools)], sort_keys=True)
    words, seed = _list_words([question]), context.encode("utf-8", "surrogatepass")
    tails = (words[skipped:] for skipped in range(1, LEADING_WORDS + 1))
    hashes = (_hash_words(tail, seed) if len(tail) >= FEWEST_WORDS else 0 for tail in tails)
    return RowIdentity(answer, (_hash_words(words, seed), *hashes))


def _list_words(messages: Sequence[Message]) -> list[str]:
    words = []
    for message in messages:
        text = f"{message.text} {message.input}" if message.input else message.text
        words += normalize_words(text) or text.split()
        words += [json.dumps(call, sort_keys=True) for call in message.calls_without_ids] if message.calls else []
    return words


def _hash_words(words: Sequence[str], seed: bytes) -> int:
    return hash_bytes(seed + " ".join(words).encode("utf-8", "surrogatepass")) or 1


def find_same_questions(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """For each row of `asked`, the first row of `known` with the same question; -1 if there is none.

    Both are (rows, IDENTITY_COLUMNS) uint64. Questions are the same if they are equal, or if one is the other with at
    most `LEADING_WORDS` words before it.
    """
    found: np.ndarray = np.full(len(asked), -1, dtype=np.int64)
    tails = range(2, IDENTITY_COLUMNS)
    for mine, theirs in [(1, 1), *((1, tail) for tail in tails), *((tail, 1) for tail in tails)]:
        position = find_first_match(known[:, theirs], asked[:, mine])
        found[found < 0] = position[found < 0]
    return found


def find_same_rows(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Like `find_same_questions`, for rows with the same answer, too; a plain text is an answer without a question."""
    joined = find_same_questions(_join_answers(known), _join_answers(asked))
    found: np.ndarray = np.maximum(joined, find_first_match(_keep_texts(known), _keep_texts(asked)))
    return found


def _join_answers(identities: np.ndarray) -> np.ndarray:
    """Identities whose questions include the answer; without a question they stay 0."""
    questions = identities[:, 1:]
    joined = np.where(questions != 0, questions ^ (identities[:, :1] * _MIX) | np.uint64(1), np.uint64(0))
    return np.concatenate([identities[:, :1], joined], axis=1)


def _keep_texts(identities: np.ndarray) -> np.ndarray:
    """The hashes of plain texts, whose whole text is their answer; 0 for other rows."""
    texts: np.ndarray = np.where(identities[:, 1] == 0, identities[:, 0], np.uint64(0))
    return texts


def find_first_match(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of `wanted` (rows,), the first position with this value in `known`; -1 if there is none or it is 0.

    Example:
        >>> find_first_match(np.array([5, 7, 7]), np.array([7, 9, 0])).tolist()
        [1, -1, -1]
    """
    if not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    values, first = np.unique(known, return_index=True)
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    is_found = (values[place] == wanted) & (wanted != 0)
    return np.where(is_found, first[place], -1)
