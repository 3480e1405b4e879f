"""An embedding that is smaller than the tokenizer's vocabulary is refused, or resized."""

from __future__ import annotations

from typing import Any

import torch

from training_lens.errors import ModelLoadingError


def required_rows(tokenizer: Any) -> int:
    """The rows that an embedding needs to have one for every token."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer: Any, rows: int, model_id: str, resize: bool) -> None:
    """Refuse a tokenizer with ids beyond the embedding's `rows`, unless `resize` (model.resize_embeddings) is set.

    Raises:
        ModelLoadingError: names both sizes.
    """
    required = required_rows(tokenizer)
    if required > rows and not resize:
        raise ModelLoadingError(
            f"model.id: the tokenizer of '{model_id}' has ids up to {required - 1}, its embedding {rows} rows. If "
            f"tokens were added to it, model.resize_embeddings=true adds and trains the {required - rows} missing "
            "rows; otherwise tokenizer and weights belong to different models."
        )


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
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
    return model


def embedding_modules(model: Any) -> list[str]:
    """Paths of the embedding and, unless it is tied to it, of the output head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(m): path for path, m in model.named_modules()}
    apart = head is not None and head.weight is not embedding.weight
    return [paths[id(embedding)], *([paths[id(head)]] if apart else [])]
