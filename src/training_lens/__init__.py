"""Training Lens: LoRA fine-tuning of causal language models that you can trust and see inside.

Example:
    from training_lens import TrainingConfig, TrainingWrapper

    rows = [{"question": "...", "answer": "..."}, ...]          # or paths: "train.jsonl"
    summary = TrainingWrapper(TrainingConfig(model={"id": "path/to/model"}, data={"train": rows})).train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training_lens import errors
from training_lens._lazy import attach
from training_lens._version import __version__ as __version__
from training_lens.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    DamagedFileError,
    DatasetError,
    EstimateError,
    EvaluationError,
    IntegrationError,
    InterruptedRunError,
    LensError,
    MergeError,
    ModelLoadingError,
    OutOfMemoryError,
    OutputError,
    ProcessLostError,
    PrunedRunError,
    TrainingError,
    TrainingLensError,
)

if TYPE_CHECKING:
    from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
    from training_lens.analysis.reports.standard import StandardReports
    from training_lens.analysis.run_reader import Run
    from training_lens.config.compose import compose
    from training_lens.config.schema import TrainingConfig
    from training_lens.integrations.hub import HuggingFaceIntegration
    from training_lens.integrations.wandb import WandBIntegration
    from training_lens.training.loop.callbacks import MetricsCollector
    from training_lens.training.loop.checkpoint_manager import CheckpointManager
    from training_lens.training.run import TrainingWrapper
    from training_lens.utils.logging import setup_logging

    LoRACheckpointAnalyzer = CheckpointAnalyzer
    LoRATrainingWrapper = TrainingWrapper

__getattr__, __dir__, _names = attach(
    {
        "training_lens.analysis.checkpoint_analyzer": ("CheckpointAnalyzer",),
        "training_lens.analysis.reports.standard": ("StandardReports",),
        "training_lens.analysis.run_reader": ("Run",),
        "training_lens.config.compose": ("compose",),
        "training_lens.config.schema": ("TrainingConfig",),
        "training_lens.integrations.hub": ("HuggingFaceIntegration",),
        "training_lens.integrations.wandb": ("WandBIntegration",),
        "training_lens.training.run": ("TrainingWrapper",),
        "training_lens.training.loop.checkpoint_manager": ("CheckpointManager",),
        "training_lens.training.loop.callbacks": ("MetricsCollector",),
        "training_lens.utils.logging": ("setup_logging",),
    },
    aliases={"LoRACheckpointAnalyzer": "CheckpointAnalyzer", "LoRATrainingWrapper": "TrainingWrapper"},
)
__all__ = [
    "AdapterError",
    "CheckpointAnalyzer",
    "CheckpointError",
    "CheckpointManager",
    "ConfigurationError",
    "DamagedFileError",
    "DatasetError",
    "EstimateError",
    "EvaluationError",
    "HuggingFaceIntegration",
    "IntegrationError",
    "InterruptedRunError",
    "LensError",
    "LoRACheckpointAnalyzer",
    "LoRATrainingWrapper",
    "MergeError",
    "MetricsCollector",
    "ModelLoadingError",
    "OutOfMemoryError",
    "OutputError",
    "ProcessLostError",
    "PrunedRunError",
    "Run",
    "StandardReports",
    "TrainingConfig",
    "TrainingError",
    "TrainingLensError",
    "TrainingWrapper",
    "WandBIntegration",
    "compose",
    "errors",
    "setup_logging",
]
