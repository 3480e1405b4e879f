"""Rows of embedding and output head: added where tokens have none, and trained alone where the tokens are new.

A new token (`data.new_tokens`) gets the first id that is free. Its row is the mean of the rows of the pieces that its
text had before, in the embedding and in the head. PEFT trains these rows and no other (`trainable_token_indices`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training_lens.errors import AdapterError, ConfigurationError, ModelLoadingError
from training_lens.models.adapter_files import read_config, require_adapter

KEY = "data.new_tokens"


@dataclass(frozen=True)
class NewToken:
    """A token that a tokenizer got: its text, its id, and the ids of the pieces that the text had before."""

    text: str
    id: int
    pieces: tuple[int, ...]


def add_tokens(tokenizer: Any, texts: Sequence[str], model_id: str) -> tuple[NewToken, ...]:
    """Add ordinary tokens to a tokenizer, in place; answers keep them where special tokens are left out.

    They are found in text as they are written, before it is normalized.

    Raises:
        ConfigurationError: names every text that is a token already, or that does not come back from its tokens.
    """
    from tokenizers import AddedToken

    known, problems = tokenizer.get_vocab() if texts else {}, list[str]()
    pieces = [_split_text(tokenizer, text) for text in texts]
    for text, ids in zip(texts, pieces, strict=True):
        single = len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(list(ids)) == text
        if text in known or single:
            problems.append(
                f"{KEY}: {text!r} is a token of '{model_id}' already (id {known.get(text, ids[0] if ids else None)}). "
                "Leave it out."
            )
        elif not ids:
            problems.append(f"{KEY}: the tokenizer of '{model_id}' drops all of {text!r}. Give another text.")
    if problems:
        raise ConfigurationError(problems)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    new = zip(texts, token_ids(tokenizer, texts), pieces, strict=True)
    added = [NewToken(text, i, ids) for text, i, ids in new]
    _require_same_text(tokenizer, added, model_id)
    return tuple(added)


def _require_same_text(tokenizer: Any, tokens: Sequence[NewToken], model_id: str) -> None:
    """Refuse tokens that are decoded to another text, as a byte-level tokenizer does with some letters beyond ASCII."""
    texts = {token.text: tokenizer.decode([token.id]) for token in tokens}
    if problems := [
        f"{KEY}: the tokenizer of '{model_id}' would write {text!r} as {found!r}. Give a text of ASCII characters."
        for text, found in texts.items()
        if found != text
    ]:
        raise ConfigurationError(problems)


def _split_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The pieces of a text, without the blank that some tokenizers put before it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tuple(ids[1:] if len(ids) > 1 and not tokenizer.decode(ids[:1]).strip() else ids)


def describe_blanks(tokenizer: Any, text: str) -> str:
    """What a tokenizer adds behind a new token, as some do that put a blank before any text; empty for others."""
    before = f"a{text}b"
    after = tokenizer.decode(tokenizer(before, add_special_tokens=False).input_ids).strip()
    if after == before:
        return ""
    return (
        f"this tokenizer reads {before!r} as {after!r}, so answers have it that way, too; where that matters, let new "
        "tokens end their texts"
    )


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The ids of tokens that a tokenizer has."""
    return [int(tokenizer.convert_tokens_to_ids(text)) for text in texts]


def required_rows(tokenizer: Any, without: Collection[str] = ()) -> int:
    """The rows that an embedding needs to have one for every token, but those in `without`."""
    ids = (i for token, i in tokenizer.get_vocab().items() if token not in without)
    return max(ids, default=-1) + 1


@torch.no_grad()
def resize_embeddings(model: Any, rows: int) -> Any:
    """Resize embedding and output head to at least `rows`, in place, and update the config.

    New rows are the mean of the old ones (in float32), so that no new token starts out likelier than others, and every
    process computes the same.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return model
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in _end_weights(model):
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
    return model


@torch.no_grad()
def add_token_rows(model: Any, tokens: Sequence[NewToken], model_id: str) -> Any:
    """Give each token a row in embedding and output head, the mean of its pieces' rows (in float32), in place.

    A row that no token had is used where there is one; else the two are resized, and the config says so.

    Raises:
        ModelLoadingError: the model's ends are not such that PEFT can train single rows of them.
    """
    if not tokens:
        return model
    _require_plain_ends(model, model_id)
    rows = max(token.id for token in tokens) + 1
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in _end_weights(model):
        means = [weight[list(token.pieces)].float().mean(0).to(weight.dtype) for token in tokens]
        for token, mean in zip(tokens, means, strict=True):
            weight[token.id] = mean
    return model


def _require_plain_ends(model: Any, model_id: str) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    reason = ""
    if not plain or not all(end.weight.is_floating_point() for end in (embedding, head)):
        kinds = " and ".join(type(end).__name__ for end in (embedding, head))
        reason = f"its embedding and output head are {kinds}, of which PEFT cannot train single rows"
    elif head.bias is not None:
        reason = "its output head has a bias, which PEFT leaves out where it trains single rows"
    if reason:
        raise ModelLoadingError(f"{KEY}: '{model_id}' cannot get new tokens: {reason}. Leave them out.")


def _end_weights(model: Any) -> list[Any]:
    """The weights of embedding and head, once where they are tied."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(end.weight): end.weight for end in ends if end is not None}.values())


def embedding_modules(model: Any) -> list[str]:
    """Paths of the embedding and, unless it is tied to it, of the output head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(m): path for path, m in model.named_modules()}
    apart = head is not None and head.weight is not embedding.weight
    return [paths[id(embedding)], *([paths[id(head)]] if apart else [])]


def choose_trained_rows(model: Any, ids: Sequence[int], whole: Sequence[str]) -> dict[str, list[int]]:
    """`trainable_token_indices` for PEFT: the new rows by module, without modules that are trained whole.

    Args:
        model: the base, to which `add_token_rows` gave the rows.
        whole: `modules_to_save` for PEFT.
    """
    paths = embedding_modules(model) if ids else []
    return {path: list(ids) for path in paths if not any(path.endswith(name) for name in whole)}


def require_untargeted(rows: Collection[str], targets: Collection[str]) -> None:
    """Refuse a LoRA on a module whose new rows are trained.

    Raises:
        AdapterError: names the module.
    """
    for path in rows:
        if path in targets:
            raise AdapterError(
                f"peft.target_modules: '{path}' has rows for {KEY}, and PEFT trains either these or a LoRA on it. "
                f"Leave it out, or train it whole: peft.modules_to_save=[{path.rpartition('.')[2]}]."
            )


def has_token_rows(layer: Any) -> bool:
    """Whether a layer of PEFT's trains single rows of its module."""
    return hasattr(layer, "token_adapter")


def token_wrappers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's wrappers of modules of which single rows are trained, with their paths in the base; tied ones, too."""
    from peft.utils.other import TrainableTokensWrapper

    plain = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    for path, module in plain.named_modules(remove_duplicate=False):
        if isinstance(module, TrainableTokensWrapper):
            yield path, module


def require_wrapped(adapted: Any, rows: Collection[str], is_tied: bool) -> None:
    """Refuse a PEFT model that does not train the rows that it was asked to, or that parts what is tied.

    Raises:
        AdapterError: names what is different.
    """
    found = {path: module.token_adapter.tied_adapter is not None for path, module in token_wrappers(adapted)}
    alone = sorted(path for path, follows in found.items() if not follows)
    if alone != sorted(rows) or any(found.values()) != (is_tied and bool(rows)):
        raise AdapterError(
            f"{KEY}: PEFT trains single rows of {', '.join(found) or 'no module'}, where it was asked for "
            f"{', '.join(rows)}. Leave the tokens out, or give another base."
        )


def rows_of_adapter(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """The trained rows by module, from an adapter's configuration; a bare list is that of the embedding, ''."""
    found = settings.get("trainable_token_indices") or {}
    return found if isinstance(found, dict) else {"": list(found)}


def _trained_ids(settings: Mapping[str, Any]) -> list[int]:
    return next(iter(rows_of_adapter(settings).values()), [])


def read_new_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """The texts of the tokens whose rows the adapter in `folder` has.

    Raises:
        AdapterError: the tokenizer lacks them.
    """
    ids, known = _trained_ids(read_config(require_adapter(folder))), required_rows(tokenizer)
    if ids and max(ids) >= known:
        raise AdapterError(
            f"the adapter in {folder} has rows for new tokens up to id {max(ids)}, and the tokenizer has {known} "
            f"tokens. Give its run, the {KEY} of its run in that order, or a folder with its tokenizer, too."
        )
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]


def require_rows(model: Any, folder: Path) -> None:
    """Refuse the adapter in `folder` if it has rows for tokens that the base has none for.

    Raises:
        AdapterError: names the largest id, and how to add the rows.
    """
    rows, largest = model.get_input_embeddings().weight.shape[0], max(_trained_ids(read_config(folder)), default=-1)
    if largest >= rows:
        raise AdapterError(
            f"the adapter in {folder} has rows for new tokens up to id {largest}, and this base has {rows} rows. Give "
            f"its run, or the {KEY} of its run in that order."
        )


def require_same_rows(adapted: Any, folder: Path) -> None:
    """Refuse to continue the adapter in `folder` where its rows are those of other tokens.

    Raises:
        AdapterError: says how many there are on both sides.
    """
    own, saved = _trained_ids(adapted.peft_config["default"].to_dict()), _trained_ids(read_config(folder))
    if own != saved:
        raise AdapterError(
            f"peft.from_adapter: {folder} has rows for {len(saved)} new tokens, this run for {len(own)}"
            f"{', with other ids' if len(own) == len(saved) else ''}. Give the {KEY} that it was trained with, in that "
            "order; none, if it was trained without."
        )
