"""The built-in collectors, one class for each table of `core.table_names`.

Importing this package registers them with `CollectorRegistry`.
"""

from __future__ import annotations

from training_lens.collectors.gradient_collector import AdapterGradientsCollector, OptimizerStateCollector
from training_lens.collectors.layer_activations import (
    ActivationExtractor,
    ActivationsCollector,
    DivergenceCollector,
    LayerStates,
)
from training_lens.collectors.lora_activation_collector import LoRAActivationsCollector, LoRAActivationTracker
from training_lens.collectors.router_load_collector import RouterLoadCollector
from training_lens.collectors.weight_collector import (
    AdapterSnapshotsCollector,
    AdapterWeightsCollector,
    BaseWeightsCollector,
    SpectraCollector,
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
    "RouterLoadCollector",
    "SpectraCollector",
]
