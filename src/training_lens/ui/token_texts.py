"""Tokens as a page shows them: the text of each, also where a character is spread over several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training_lens.ui.token_pieces import build_decode, decode_pieces

BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenText:
    """One token. The texts of tokens that are not `is_partial`, joined, are the text of all.

    A partial token adds no text of its own, mostly as it ends within a character; its text names its bytes, as in
    '<0xF0><0x9F>'. The last token of such a character has the whole character.
    """

    id: int
    text: str
    is_special: bool
    is_partial: bool


def spell_tokens(tokenizer: Any, ids: Sequence[int], special_ids: frozenset[int] = frozenset()) -> list[TokenText]:
    """The text of each token of a text, in the context of those before it.

    Args:
        tokenizer: a fast one of transformers.
        special_ids: those that control the model.

    Cost: see `decode_pieces`.
    """
    texts = decode_pieces(build_decode(tokenizer.backend_tokenizer), ids, range(1, len(ids) + 1))
    return [
        TokenText(token, text or _spell_bytes(tokenizer, token), token in special_ids, not text)
        for token, text in zip(ids, texts, strict=True)
    ]


def _spell_bytes(tokenizer: Any, token: int) -> str:
    """The bytes of a token by name, as the vocabularies of SentencePiece write them."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if BYTE_NAME.fullmatch(name) or any(character not in BYTE_LETTERS for character in name):
        return name
    return "".join(f"<0x{BYTE_LETTERS[character]:02X}>" for character in name)


def _list_byte_letters() -> dict[str, int]:
    """The letter by which a byte-level vocabulary writes each byte, as GPT-2's does: itself where it prints."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_LETTERS = _list_byte_letters()
