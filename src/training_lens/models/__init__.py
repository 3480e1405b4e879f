"""Base models and adapters: loading, checking, saving, and the fast path in `fast/`."""

from __future__ import annotations

from training_lens._lazy import attach as export  # `attach` here is that of an adapter

__getattr__, __dir__, __all__ = export(
    {
        "training_lens.config.schema": ("ModelSection", "PeftSection"),
        "training_lens.models.adapters": ("attach", "base_only", "count_parameters", "load_adapter", "save_adapter"),
        "training_lens.models.factory": ("ModelFacts", "load_model", "load_tokenizer", "read_facts"),
    }
)
