"""Figures of a recording: pure functions that give Plotly figures, bounded in their points however long the run is."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.analysis.figures.activation_figures": ("ActivationVisualizer", "activation_drift"),
        "training_lens.analysis.figures.catalogue": ("DRAWINGS", "Drawing"),
        "training_lens.analysis.figures.layer_figures": (
            "adapter_share",
            "balance",
            "effective_rank",
            "gradient_cosine",
            "gradient_norm",
            "gradient_norm_by_kind",
            "optimizer_jumps",
            "step_ratio_by_kind",
            "update_strength",
            "update_strength_by_kind",
        ),
        "training_lens.analysis.figures.run_figures": ("cost", "divergence", "epoch_ends", "loss", "spikes"),
        "training_lens.analysis.figures.spectrum_figures": (
            "spectrum_by_kind",
            "spectrum_over_steps",
            "strongest_module",
        ),
        "training_lens.analysis.figures.style": ("alike",),
    }
)
