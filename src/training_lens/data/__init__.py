"""Rows to batches: sources, fields, templates, tokenization, preparation, batching."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.config.data_sections": ("DataSection",),
        "training_lens.data.batching": ("Schedule", "collate", "hold_out"),
        "training_lens.data.token_cache": ("Split", "prepare_split"),
        "training_lens.data.token_pipeline": ("Preparation", "tokenize"),
        "training_lens.data.source_reader": ("read_examples",),
        "training_lens.data.token_dataset": ("TokenDataset",),
        "training_lens.data.templates": ("build_renderer",),
        "training_lens.data.tokenization": ("TextEncoder",),
        "training_lens.data.examples": ("Batch", "Example", "Message", "Row", "TokenizedExample"),
    }
)
