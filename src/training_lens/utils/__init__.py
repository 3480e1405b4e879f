"""Foundations: logging, devices, seeding, atomic files, hashes, secrets, formatting."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.utils.logging": ("TrainingLogger", "get_logger", "setup_logging"),
        "training_lens.utils.devices": ("get_device",),
        "training_lens.utils.formatting": ("format_size",),
        "training_lens.utils.integrity": ("safe_save",),
    }
)
