"""The analyzers: each reads a recording and returns plain values. Importing the package registers the built-in ones."""

from __future__ import annotations

from training_lens.analyzers.convergence_analyzer import ActivationAnalyzer, ConvergenceAnalyzer
from training_lens.analyzers.lora_analyzer import GradientAnalyzer, LoRAAnalyzer
from training_lens.analyzers.router_load_analyzer import RouterLoadAnalyzer
from training_lens.analyzers.similarity_analyzer import SimilarityAnalyzer

WeightAnalyzer = LoRAAnalyzer

__all__ = [
    "ActivationAnalyzer",
    "ConvergenceAnalyzer",
    "GradientAnalyzer",
    "LoRAAnalyzer",
    "RouterLoadAnalyzer",
    "SimilarityAnalyzer",
    "WeightAnalyzer",
]
