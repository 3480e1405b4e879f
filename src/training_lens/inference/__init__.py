"""Inference: a session on a trained adapter, and prompts to answers."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.config.evaluation_sections": ("InferenceSection",),
        "training_lens.inference.batch": ("FileReport", "answer_file", "input_file", "output_file"),
        "training_lens.inference.generator": ("GeneratedAnswer", "answer", "answers", "generate_answers"),
        "training_lens.inference.session": ("Session", "open_run", "open_session"),
    }
)
