"""What is captured while training runs, one class for each table of `core.tables`.

Importing this package makes the built-in collectors known to `CollectorRegistry`.
"""

from __future__ import annotations

from training_lens.collectors.activations import ActivationsCollector, DivergenceCollector
from training_lens.collectors.gradients import AdapterGradientsCollector
from training_lens.collectors.layers import ActivationExtractor, LayerStates
from training_lens.collectors.lora_activations import LoRAActivationsCollector, LoRAActivationTracker
from training_lens.collectors.optimizer import OptimizerStateCollector
from training_lens.collectors.spectra import SpectraCollector
from training_lens.collectors.weights import (
    AdapterSnapshotsCollector,
    AdapterWeightsCollector,
    BaseWeightsCollector,
)

__all__ = [
    "ActivationExtractor",
    "ActivationsCollector",
    "AdapterGradientsCollector",
    "AdapterSnapshotsCollector",
    "AdapterWeightsCollector",
    "BaseWeightsCollector",
    "DivergenceCollector",
    "LayerStates",
    "LoRAActivationTracker",
    "LoRAActivationsCollector",
    "OptimizerStateCollector",
    "SpectraCollector",
]
