"""Collectors and analyzers are known by name: the built-in ones, decorated ones, and those of other packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.registry import AnalyzerRegistry, CollectorRegistry
from training_lens.core.types import Captured, DataType
from training_lens.errors import ConfigurationError

PLUGIN = """
from training_lens.core import Captured, DataCollector, DataType

class Mine(DataCollector):
    name, data_type = "mine", DataType.ADAPTER_WEIGHTS
    def collect(self, watched, step):
        return Captured()
"""
BROKEN = "raise RuntimeError('half installed')"


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = [(r, dict(r._classes)) for r in (CollectorRegistry, AnalyzerRegistry)]
    CollectorRegistry.names(), AnalyzerRegistry.names()
    yield
    for registry, classes in before:
        registry._classes.clear()
        registry._classes.update(classes)


def test_the_built_in_classes_are_registered() -> None:
    assert {"adapter_weights", "adapter_gradients", "lora_activations", "activations"} <= set(CollectorRegistry.names())
    assert {"weights", "gradients", "activations", "convergence", "similarity"} <= set(AnalyzerRegistry.names())


@pytest.mark.usefixtures("registries")
def test_a_decorated_class_is_known_by_its_name() -> None:
    @CollectorRegistry.register
    class Own(DataCollector):
        name, data_type = "own", DataType.LOSS

        def collect(self, context: CaptureContext, step: int) -> Captured:
            return Captured()

    @AnalyzerRegistry.register
    class Reading(DataAnalyzer):
        name, needs, gives = "own", frozenset(), ()

        def analyze(self, recording: Recording) -> Mapping[str, Any]:
            return {}

    assert CollectorRegistry.get("own") is Own
    assert AnalyzerRegistry.get("own") is Reading


@pytest.mark.usefixtures("registries")
def test_two_classes_of_one_name_are_refused() -> None:
    class Other(DataCollector):
        name, data_type = "adapter_weights", DataType.LOSS

        def collect(self, context: CaptureContext, step: int) -> Captured:
            return Captured()

    with pytest.raises(ConfigurationError, match=r"'adapter_weights' is .*AdapterWeightsCollector already"):
        CollectorRegistry.register(Other)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'adapter_weights'"):
        CollectorRegistry.get("adapter_weight")


def test_entry_points_are_loaded_and_broken_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text(BROKEN)
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[training_lens.collectors]\nmine = plugin:Mine\nbad = broken:Gone\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from training_lens.utils.logging import setup_logging; from rich.console import Console\n"
        "setup_logging(Console())\n"
        "from training_lens.core import CollectorRegistry\n"
        "print(CollectorRegistry.get('mine').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "plugin" in done.stdout.splitlines()
    assert "'broken:Gone' cannot be used: half installed" in " ".join(done.stdout.split())
