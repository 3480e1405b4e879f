"""Destinations of a run: trackers (your own is one class, see `Tracker`), the hub, storage. None makes a run wait."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.integrations.activation_storage": ("ActivationStorage",),
        "training_lens.integrations.hub": ("HuggingFaceIntegration",),
        "training_lens.integrations.record": ("RunRecord",),
        "training_lens.integrations.storage": ("LocalStorage", "StorageBackend", "open_storage"),
        "training_lens.integrations.tracker": ("Record", "Tracker"),
        "training_lens.integrations.wandb": ("WandBIntegration",),
    }
)
