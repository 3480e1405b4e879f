"""Collectors and analyzers are known by name: the built-in ones, decorated ones, and those of other packages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from training_lens.core.collector import AnalyzerRegistry, CaptureContext, CollectorRegistry, DataCollector
from training_lens.core.recording import DataAnalyzer, Recording
from training_lens.core.types import Captured, DataType
from training_lens.errors import ConfigurationError
from training_lens.utils.logging import ROOT

PLUGIN = """
from training_lens.core import Captured, DataCollector, DataType

class Mine(DataCollector):
    name, data_type = "mine", DataType.ADAPTER_WEIGHTS
    def collect(self, watched, step):
        return Captured()
"""


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


@pytest.mark.usefixtures("registries")
def test_entry_points_are_loaded_and_broken_ones_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plugin_of_another.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('half installed')")
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    points = "[training_lens.collectors]\nmine = plugin_of_another:Mine\nbad = broken_plugin:Gone\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(CollectorRegistry, "_is_loaded", False)  # as in a new process
    monkeypatch.setattr(logging.getLogger(ROOT), "propagate", True)
    assert CollectorRegistry.get("mine").__module__ == "plugin_of_another"
    assert "'broken_plugin:Gone' cannot be used: half installed" in caplog.text
