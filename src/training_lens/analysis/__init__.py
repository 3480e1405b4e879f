"""Analysis of a finished, running or interrupted run: findings, figures, reports. See `CheckpointAnalyzer`."""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.analysis.adapter_analyzers": ("LoRAParameterAnalyzer",),
        "training_lens.analysis.checkpoint_analyzer": ("Analysis", "CheckpointAnalyzer", "AdapterComparison"),
        "training_lens.analysis.figures.layer_figures": ("ActivationVisualizer",),
        "training_lens.analysis.open_recording": ("open_recording",),
        "training_lens.analysis.reports.technical": ("comparison",),
        "training_lens.analysis.reports.executive": ("three_lines",),
        "training_lens.analysis.reports.standard": ("Report", "StandardReports"),
        "training_lens.analysis.run_reader": ("Run",),
        "training_lens.analysis.run_card": ("RunComparison",),
        "training_lens.analysis.findings.live_checks": ("build_findings_callback",),
        "training_lens.analyzers.convergence_analyzer": ("ActivationAnalyzer",),
        "training_lens.analyzers.lora_analyzer": ("GradientAnalyzer", "LoRAAnalyzer"),
        "training_lens.collectors.layer_activations": ("ActivationExtractor",),
        "training_lens.collectors.lora_activation_collector": ("LoRAActivationTracker",),
    },
    aliases={"Comparison": "AdapterComparison", "WeightAnalyzer": "LoRAAnalyzer"},
)
