"""Text to tokens, segment by segment, so that a prompt has the same tokens in training and at inference.

BOS is added once at the front if the tokenizer itself would add it; an answer's end token is part of its segment. The
pad token is never used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from training_lens.data.columns import EncodedRows, compute_offsets
from training_lens.data.examples import TextSegment
from training_lens.errors import DatasetError, ModelLoadingError

ANCHORS = ("\n", "|", "a", "1", ".")


class TextEncoder:
    """Encodes segments with a fast tokenizer. Not thread-safe, like the tokenizer itself.

    Some tokenizers put a space before any text. After the first segment that space would be spurious, so a
    one-character anchor is put there to take it, and cut off again.

    Raises:
        ModelLoadingError: the tokenizer cannot be used for training: slow, without EOS, or yielding no tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        _check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        with_special = self._encode_plain(["a"], special=True)[0]
        bos = tokenizer.bos_token_id
        self.bos_id: int | None = bos if bos is not None and with_special[:1] == [bos] else None
        if self.bos_id is not None and with_special[:2] == [bos, bos]:
            raise ModelLoadingError("the tokenizer puts BOS twice at the front; mend its tokenizer.json.")
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids: frozenset[int] = frozenset(special | set(tokenizer.all_special_ids))
        # Anchors for tokenizers that add a space; none if text is encoded as it is.
        alone = [self._encode_plain([a])[0] for a in ANCHORS]
        doubled = [self._encode_plain([a + a])[0] for a in ANCHORS]
        adds_space = any(len(two) < 2 * len(one) and len(one) > 1 for one, two in zip(alone, doubled, strict=True))
        self._anchors = list(zip(ANCHORS, alone, strict=True)) if adds_space else []

    def encode(self, examples: Sequence[Sequence[TextSegment]]) -> EncodedRows:
        """Encode rendered examples (or prompts) in one call of the tokenizer.

        Raises:
            DatasetError: the rendered text begins with BOS twice.
        """
        counts = np.fromiter(map(len, examples), np.int64, len(examples))
        ends = compute_offsets(counts)
        segments = list(chain.from_iterable(examples))
        firsts = ends[:-1][counts > 0]
        pieces = self._encode_segments(segments, set(firsts.tolist()))
        bos = [] if self.bos_id is None else [self.bos_id]
        given = [place for place in firsts.tolist() if bos and pieces[place][:1] != bos]
        for place in given:
            pieces[place] = bos + pieces[place]
        stretches = compute_offsets(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        ids = np.fromiter(chain.from_iterable(pieces), np.int32, stretches[-1])
        response = np.repeat(np.fromiter((s.response for s in segments), bool, len(segments)), np.diff(stretches))
        response[stretches[given]] = False
        rows = EncodedRows(ids, response, stretches[ends])
        starts = rows.offsets[:-1][rows.lengths > 1]
        front = ids[starts[:, None] + [0, 1]]  # (examples, 2)
        if self.bos_id is not None and (front == self.bos_id).all(axis=1).any():
            raise DatasetError(
                "the chat template begins with BOS twice; take one out of it (data.template=FILE.jinja)."
            )
        return rows

    def encode_prompt(self, segments: Sequence[TextSegment]) -> list[int]:
        """The tokens of one prompt, as training saw them."""
        return [int(i) for i in self.encode([segments]).input_ids]

    def find_unknown_characters(self, characters: Iterable[str]) -> set[str]:
        """The characters without a token: this tokenizer drops them or returns its unknown token."""
        listed = list(characters)
        unknown = self._tokenizer.unk_token_id
        nothing, *each = self._encode_plain(["aa", *(f"a{c}a" for c in listed)], plain=True)
        return {c for c, ids in zip(listed, each, strict=True) if ids == nothing or unknown in ids}

    def _encode_segments(self, segments: Sequence[TextSegment], firsts: Collection[int]) -> list[list[int]]:
        """The tokens of each segment; those at `firsts` begin an example, the others continue one."""
        pieces: list[list[int]] = [[]] * len(segments)
        for plain in (False, True):
            chosen = [place for place, segment in enumerate(segments) if segment.plain == plain]
            texts = [(segments[place].text, place not in firsts) for place in chosen]
            for place, ids in zip(chosen, self._encode_texts(texts, plain), strict=True):
                pieces[place] = ids
        return pieces

    def _encode_texts(self, texts: Sequence[tuple[str, bool]], plain: bool) -> list[list[int]]:
        """Token ids of each (text, continues): a continuation gets no spurious leading space."""
        if not self._anchors:
            return self._encode_plain([text for text, _ in texts], plain=plain)
        anchor, prefix = self._anchors[0]
        encoded = self._encode_plain([anchor + text if continues else text for text, continues in texts], plain=plain)
        return [
            self._strip_anchor(text, ids, prefix, plain) if continues else ids
            for (text, continues), ids in zip(texts, encoded, strict=True)
        ]

    def _strip_anchor(self, text: str, ids: list[int], prefix: list[int], plain: bool) -> list[int]:
        if ids[: len(prefix)] == prefix:
            return ids[len(prefix) :]
        for anchor, other in self._anchors[1:]:  # the first anchor merged with the text's first token
            ids = self._encode_plain([anchor + text], plain=plain)[0]
            if ids[: len(other)] == other:
                return ids[len(other) :]
        raise DatasetError(f"cannot tokenize {text[:40]!r} behind a prompt without inventing a space before it.")

    def _encode_plain(self, texts: list[str], *, special: bool = False, plain: bool = False) -> list[list[int]]:
        """The tokens of each text from the Rust tokenizer: the Python wrapper would double the time."""
        if not texts:
            return []
        rules = self._tokenizer.backend_tokenizer
        rules.no_truncation()  # an earlier user of the tokenizer may have left both on
        rules.no_padding()
        rules.encode_special_tokens = plain
        return [encoding.ids for encoding in rules.encode_batch_fast(texts, add_special_tokens=special)]


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadingError("this tokenizer has no tokenizer.json; convert it to a fast tokenizer first.")
    if tokenizer.eos_token_id is None:
        there = sorted(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        has = f" Its special tokens: {', '.join(there[:8])}." if there else ""
        named = f" (it names '{tokenizer.eos_token}', which its vocabulary lacks)" if tokenizer.eos_token else ""
        raise ModelLoadingError(
            f"the tokenizer has no EOS token{named}, so a model could never learn to stop. "
            f"Set eos_token in its tokenizer_config.json to one that its vocabulary has.{has}"
        )
    if not tokenizer("word and word", add_special_tokens=False)["input_ids"]:
        raise ModelLoadingError("the tokenizer gives no tokens at all for plain words; its vocabulary is broken.")


class CharacterCoverage:
    """Counts characters of texts, and those without a token."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._seen: set[str] = set()
        self._seen_ascii = b""
        self._unknown: set[str] = set()
        self.characters = 0
        self.unknown: Counter[str] = Counter()

    def count_texts(self, texts: Sequence[str]) -> None:
        """Count the characters of these texts."""
        ascii_texts = "".join(text for text in texts if text.isascii()).encode()
        present = set(ascii_texts.translate(None, self._seen_ascii).decode())
        present = present.union(*(text for text in texts if not text.isascii())) - self._seen
        self._seen |= present
        self._seen_ascii += "".join(filter(str.isascii, present)).encode()
        self._unknown |= self._encoder.find_unknown_characters(present)
        self.characters += sum(map(len, texts))
        for character in self._unknown:
            self.unknown[character] += sum(text.count(character) for text in texts)


def decode_spans(tokenizer: Any, input_ids: np.ndarray, mask: np.ndarray) -> list[tuple[str, bool]]:
    """Decode an example into spans (text, is_learned).

    Each span is decoded together with everything before it: some tokenizers drop a leading space when decoding.
    """
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    texts = [str(tokenizer.decode(input_ids[:edge], clean_up_tokenization_spaces=False)) for edge in edges]
    return [(texts[i + 1][len(texts[i]) :], bool(mask[edges[i]])) for i in range(len(edges) - 1)]
