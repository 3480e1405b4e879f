"""Text to tokens: segment by segment, so that a prompt has the same tokens in training and at inference.

BOS stands once at the front where the tokenizer itself would put it; every response ends in one end token, the
template's own or EOS. The pad token plays no part in any decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_lens.data.types import Segment
from training_lens.errors import DatasetError, ModelLoadingError

ANCHORS = ("\n", "|", "a", "1", ".")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one example and which of them belong to a response (int32 and bool, of one length)."""

    input_ids: np.ndarray
    response: np.ndarray


class TextEncoder:
    """Encodes segments with a fast tokenizer.

    Some tokenizers put a space before any text they are given. Behind the first segment that space would be an
    invention, so there a one-character anchor takes it and is cut off again.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelLoadingError("this tokenizer has no tokenizer.json; convert it to a fast tokenizer first.")
        if tokenizer.eos_token_id is None:
            raise ModelLoadingError(
                "the tokenizer names no EOS token, so a model could never learn to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        self._tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        with_special = self._ids(["a"], special=True)[0]
        bos = tokenizer.bos_token_id
        self.bos_id: int | None = bos if bos is not None and with_special[:1] == [bos] else None
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids: frozenset[int] = frozenset(special | set(tokenizer.all_special_ids))
        # Anchors that put a space-taking tokenizer past its start; none where text is encoded as it is.
        alone = [self._ids([a])[0] for a in ANCHORS]
        doubled = [self._ids([a + a])[0] for a in ANCHORS]
        adds_space = any(len(two) < 2 * len(one) and len(one) > 1 for one, two in zip(alone, doubled, strict=True))
        self._anchors = list(zip(ANCHORS, alone, strict=True)) if adds_space else []

    def encode(self, examples: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Encode many rendered examples (or prompts) in one call of the tokenizer.

        A response that has no token in this tokenizer gets no end token either: there is nothing to learn in it.
        """
        texts = [(segment.text, index > 0) for segments in examples for index, segment in enumerate(segments)]
        pieces = iter(self._encode_texts(texts))
        return [self._join(segments, [next(pieces) for _ in segments]) for segments in examples]

    def prompt_ids(self, segments: Sequence[Segment]) -> list[int]:
        """The tokens of one prompt, as training saw them."""
        return [int(i) for i in self.encode([segments])[0].input_ids]

    def _join(self, segments: Sequence[Segment], pieces: list[list[int]]) -> Encoded:
        ids: list[int] = []
        response: list[bool] = []
        for segment, piece in zip(segments, pieces, strict=True):
            if not ids and self.bos_id is not None and piece[:1] != [self.bos_id]:
                ids, response = [self.bos_id], [False]
            if segment.response and piece and piece[-1] not in self.special_ids:
                piece = [*piece, self.eos_id]
            ids += piece
            response += [segment.response] * len(piece)
        return Encoded(np.array(ids, dtype=np.int32), np.array(response, dtype=bool))

    def _encode_texts(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of each (text, continues): a continuation gets no invented space at its front."""
        if not self._anchors:
            return self._ids([text for text, _ in texts])
        anchor, prefix = self._anchors[0]
        encoded = self._ids([anchor + text if continues else text for text, continues in texts])
        return [
            self._without_anchor(text, ids, prefix) if continues else ids
            for (text, continues), ids in zip(texts, encoded, strict=True)
        ]

    def _without_anchor(self, text: str, ids: list[int], prefix: list[int]) -> list[int]:
        if ids[: len(prefix)] == prefix:
            return ids[len(prefix) :]
        for anchor, other in self._anchors[1:]:  # the first anchor melted into the text's own first token
            ids = self._ids([anchor + text])[0]
            if ids[: len(other)] == other:
                return ids[len(other) :]
        raise DatasetError(f"cannot tokenize {text[:40]!r} behind a prompt without inventing a space before it.")

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def mask_of(encoded: Encoded, mask_prompt: bool) -> np.ndarray:
    """Which tokens are learned: the response's, or all of them."""
    return encoded.response if mask_prompt else np.ones_like(encoded.response)


def fit(encoded: Encoded, seq_len: int) -> Encoded:
    """The first `seq_len` tokens: a cut answer loses its end and its end token, and so does not teach to stop."""
    return Encoded(encoded.input_ids[:seq_len], encoded.response[:seq_len])
