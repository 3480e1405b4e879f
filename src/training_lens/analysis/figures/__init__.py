"""Figures of a recording: pure functions that return Plotly figures, with a bounded number of points."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.analysis.figures.catalogue": ("REPORT_FIGURES", "ReportFigure"),
        "training_lens.analysis.figures.layer_figures": (
            "ActivationVisualizer",
            "plot_activation_drift",
            "plot_adapter_share",
            "plot_balance",
            "plot_effective_rank",
            "plot_gradient_cosine",
            "plot_gradient_norm",
            "plot_gradient_norm_by_kind",
            "plot_optimizer_jumps",
            "plot_spectrum_by_kind",
            "plot_spectrum_over_steps",
            "find_strongest_module",
            "plot_step_ratio_by_kind",
            "plot_update_strength",
            "plot_update_strength_by_kind",
        ),
        "training_lens.analysis.figures.run_figures": (
            "plot_cost",
            "plot_divergence",
            "find_epoch_ends",
            "plot_loss",
            "find_spikes",
        ),
        "training_lens.analysis.figures.style": ("match_scales",),
    }
)
