"""The public surface, pinned."""

from __future__ import annotations

import subprocess
import sys

import pytest

import training_lens
import training_lens.evaluation
import training_lens.training
import training_lens.utils


def test_public_names() -> None:
    assert training_lens.__all__ == [
        "CheckpointAnalyzer",
        "CheckpointManager",
        "HuggingFaceIntegration",
        "LoRACheckpointAnalyzer",
        "LoRATrainingWrapper",
        "MetricsCollector",
        "Run",
        "StandardReports",
        "TrainingConfig",
        "TrainingWrapper",
        "WandBIntegration",
    ]
    assert training_lens.training.__all__ == [
        "CheckpointManager",
        "CheckpointMetadata",
        "MetricsCollector",
        "TrainingConfig",
        "TrainingWrapper",
    ]
    assert {"EvaluationSection", "Judge", "find_run", "open_run", "validation_examples"} < set(
        training_lens.evaluation.__all__
    )
    assert training_lens.utils.__all__ == [
        "TrainingLogger",
        "format_size",
        "get_device",
        "get_logger",
        "safe_save",
        "setup_logging",
    ]


@pytest.mark.parametrize(
    "package", [training_lens, training_lens.evaluation, training_lens.training, training_lens.utils]
)
def test_every_public_name_resolves(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no public name 'nothing'"):
        package.nothing  # type: ignore[attr-defined] # noqa: B018


def test_one_implementation_each() -> None:
    assert training_lens.LoRATrainingWrapper is training_lens.TrainingWrapper
    assert training_lens.LoRACheckpointAnalyzer is training_lens.CheckpointAnalyzer
    assert training_lens.training.TrainingConfig is training_lens.TrainingConfig


def test_importing_the_package_pulls_in_no_torch() -> None:
    code = "import sys, training_lens; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
