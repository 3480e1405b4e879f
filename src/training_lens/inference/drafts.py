"""Draft tokens for speculative decoding, looked up in a row's own text.

A draft is what followed the row's last tokens where they stood before, in its prompt or its answer (prompt lookup, as
in transformers' `prompt_lookup_num_tokens`). The model computes all of it in one step, and what differs from its own
greedy choice is refused. A step is bound by reading the weights, so a few more tokens cost little, and text that
repeats, such as extractions, edits and summaries, comes several tokens a step.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (3, 2)  # tokens that must have stood together before; the longer match counts
LENGTHS = (1, 3, 7, 15)  # of drafts: with the token before them, the products' kernels take rows by four
FIRST = 1  # the place in LENGTHS of the first draft
MOST_REFUSED = 4  # drafts in a row of which nothing was right; then the row pauses
PAUSES = (16, 32, 64, 128, 256)  # tokens without drafts, longer each time until a draft is right again


class NgramDrafts:
    """Proposes drafts for one row, and learns from what was accepted how long they may be, and whether to pause.

    All of it depends on the row's tokens alone, never on a clock. So the same row always has the same drafts.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # where what followed an n-gram stands, of its last occurrence
        self._length, self._refused, self._pauses = FIRST, 0, 0
        self._resumes_at = 0  # tokens of text

    def propose(self, prompt: Sequence[int], answer: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may come next; none where nothing was found, or in a pause."""
        text = self._text
        known = len(text)
        text += prompt[known:] if known < len(prompt) else ()
        text += answer[max(0, known - len(prompt)) :]
        for end in range(max(known, 1), len(text)):  # of n-grams that have a follower now
            for size in NGRAMS:
                if size <= end:
                    self._followers[tuple(text[end - size : end])] = end
        if len(text) < self._resumes_at:
            return []
        found = (self._followers.get(tuple(text[-size:])) for size in NGRAMS if size <= len(text))
        place = next((place for place in found if place is not None), None)
        if place is None:
            return []
        period = len(text) - place  # a draft that runs past the end of the text repeats itself
        return [text[place + i % period] for i in range(min(most, LENGTHS[self._length]))]

    def note_accepted(self, drafted: int, accepted: int) -> None:
        """Say how many tokens of the last draft were right."""
        if accepted == drafted:
            self._length = min(self._length + 1, len(LENGTHS) - 1)
        elif 2 * accepted < drafted:
            self._length = max(self._length - 1, 0)
        if accepted:
            self._refused = self._pauses = 0
            return
        self._refused += 1
        if self._refused == MOST_REFUSED:
            self._resumes_at = len(self._text) + PAUSES[self._pauses]
            self._pauses = min(self._pauses + 1, len(PAUSES) - 1)
            self._refused = MOST_REFUSED - 1  # after a pause one more refusal is enough for the next
