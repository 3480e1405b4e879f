"""Measures, pure functions of tensors, and the analyzers: what a recording says in plain values.

Importing the package registers the built-in analyzers.
"""

from __future__ import annotations

from training_lens.analyzers.readings.activations import ActivationAnalyzer
from training_lens.analyzers.readings.convergence import ConvergenceAnalyzer
from training_lens.analyzers.readings.gradients import GradientAnalyzer
from training_lens.analyzers.readings.similarity import SimilarityAnalyzer
from training_lens.analyzers.readings.weights import LoRAAnalyzer

WeightAnalyzer = LoRAAnalyzer

__all__ = [
    "ActivationAnalyzer",
    "ConvergenceAnalyzer",
    "GradientAnalyzer",
    "LoRAAnalyzer",
    "SimilarityAnalyzer",
    "WeightAnalyzer",
]
