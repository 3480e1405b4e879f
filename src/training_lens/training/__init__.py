"""Training: the loop, its optimizer, checkpoints and callbacks, and the wrapper that assembles a run."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.config.schema": ("TrainingConfig",),
        "training_lens.training.run": ("TrainingWrapper",),
        "training_lens.training.loop.checkpoint_manager": ("CheckpointManager",),
        "training_lens.training.loop.callbacks": ("MetricsCollector",),
        "training_lens.runs.checkpoint_format": ("CheckpointMetadata",),
    }
)
