"""The two ends of a model: embedding and output head, which may be one weight."""

from __future__ import annotations

from typing import Any


def find_head(model: Any) -> str:
    """The path of the output head."""
    return next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), "")


def has_tied_ends(model: Any) -> bool:
    """Whether embedding and output head are one weight."""
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())
