"""Recordings for tests of the analysis: made of arrays, through the real store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.config.lens_section import LensSection
from training_lens.core import tables
from training_lens.core.recording import Recording
from training_lens.core.store import LensStore, LensWriter
from training_lens.core.types import RUN, Captured, DataType, LensManifest, ModuleRecord

Columns = Mapping[str, Any]  # measure -> (steps, rows), or (steps, rows, any) of vectors; or its one row (steps,)
KINDS = {
    tables.GRADIENTS: DataType.ADAPTER_GRADIENTS,
    tables.OPTIMIZER: DataType.OPTIMIZER_STATE,
    tables.ACTIVATIONS: DataType.ACTIVATIONS,
    tables.DIVERGENCE: DataType.ACTIVATIONS,
    tables.LORA_ACTIVATIONS: DataType.LORA_ACTIVATIONS,
    tables.LOSS: DataType.LOSS,
    tables.EVALUATION: DataType.LOSS,
}


@pytest.fixture
def modules() -> tuple[ModuleRecord, ...]:
    """Two layers of q and v, and a head outside of them."""
    names = [(f"model.layers.{layer}.self_attn.{kind}_proj", layer, kind) for layer in (0, 1) for kind in ("q", "v")]
    found = [ModuleRecord(name, layer, kind, 4, 16, 16, 2.0) for name, layer, kind in names]
    return (*found, ModuleRecord("lm_head", None, "lm_head", 4, 16, 32, 2.0))


@pytest.fixture
def record(tmp_path: Path, modules: tuple[ModuleRecord, ...]) -> Callable[..., Recording]:
    """Writes tables and gives their recording: `record({"adapter_weights": (steps, {"norm_b": values})})`."""

    def write(
        content: Mapping[str, tuple[Any, Columns]],
        *,
        name: str = "run",
        of: tuple[ModuleRecord, ...] = modules,
        rows: Mapping[str, tuple[str, ...]] | None = None,
        snapshots: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
        cost: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        probe: Mapping[str, int] | None = None,
    ) -> Recording:
        kinds = {table: KINDS.get(table, DataType.ADAPTER_WEIGHTS) for table in content}
        manifest = LensManifest(of, tables=kinds, settings=settings or {}, probe=probe)
        writer = LensWriter(tmp_path / name, manifest, LensSection())
        for table, (steps, columns) in content.items():
            names = (rows or {}).get(table) or _rows(table, of)
            for i, step in enumerate(steps):
                writer.add(table, int(step), _captured(columns, i, names))
        for step, tensors in (snapshots or {}).items():
            writer.add(tables.SNAPSHOTS, step, Captured(tensors=tensors))
        writer.close(cost)
        return Recording(name, tmp_path / name, manifest, LensStore(tmp_path / name), "finished")

    return write


def _rows(table: str, of: tuple[ModuleRecord, ...]) -> tuple[str, ...]:
    whole = table in (tables.LOSS, tables.EVALUATION, tables.DIVERGENCE)
    return (RUN,) if whole else tuple(m.name for m in of)


def _captured(columns: Columns, i: int, names: tuple[str, ...]) -> Captured:
    taken = {measure: np.atleast_1d(np.asarray(values, float)[i]) for measure, values in columns.items()}
    scalars = {measure: torch.as_tensor(values) for measure, values in taken.items() if values.ndim == 1}
    vectors = {measure: [*torch.as_tensor(values)] for measure, values in taken.items() if values.ndim == 2}
    return Captured(scalars, vectors, rows=names)
