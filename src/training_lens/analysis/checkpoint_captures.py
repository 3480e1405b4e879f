"""Captures computed from checkpoints, for runs that were trained without the lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import pyarrow as pa
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from training_lens.analysis.saved_adapters import BaseWeights, SavedAdapter, require_alike
from training_lens.analyzers.saved_factors import FactorBatch, batch_factors
from training_lens.core import table_names as tables
from training_lens.core.arrow import MODULE, STEP, arrow_table, choose_columns, suggest_name
from training_lens.core.recording import Captures
from training_lens.core.types import Captured
from training_lens.errors import LensError
from training_lens.measures.adapter_measures import adapter_norms, update_spectrum
from training_lens.measures.factors import Factors
from training_lens.measures.singular_values import dora_change, top_singular_value
from training_lens.merging.weight_update import LowRankUpdate


class CheckpointCaptures(Captures):
    """`Captures` from adapter folders: tables of weights, spectra, base weights and logged losses.

    Everything is measured on first access, with one adapter in memory at a time. `norm_step` is the change since the
    previous checkpoint, over any number of steps.

    Args:
        adapters: those of one run; refused if their modules or shapes differ.
        logged: the tables `loss` and `evaluation`, if known.
        base: the base weights; None: measures relative to them are missing.
    """

    def __init__(
        self, adapters: Sequence[SavedAdapter], logged: Mapping[str, pa.Table], base: BaseWeights | None
    ) -> None:
        require_alike(list(adapters))
        self._adapters = {adapter.step: adapter for adapter in adapters}
        self._records = adapters[0].records
        self._logged, self._base = dict(logged), base

    def tables(self) -> tuple[str, ...]:
        base = (tables.BASE,) if self._base else ()
        return tuple(sorted({*self._logged, *base, tables.WEIGHTS, tables.SPECTRA, tables.SNAPSHOTS}))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table with the columns step, module and its measures, or those of `columns`."""
        table = self._read_table(name)
        return table.select(choose_columns(table, columns))

    def measures(self, name: str) -> tuple[str, ...]:
        return tuple(column for column in self._read_table(name).column_names if column not in (STEP, MODULE))

    def snapshot_steps(self, table: str) -> list[int]:
        """The steps of the checkpoints; empty for tables other than `adapters`."""
        return sorted(self._adapters) if table == tables.SNAPSHOTS else []

    def snapshot(self, table: str, step: int) -> dict[str, Tensor]:
        """`{module}.a`, `{module}.b` and `{module}.magnitude` of a checkpoint."""
        if step not in self.snapshot_steps(table):
            there = ", ".join(map(str, self.snapshot_steps(table))) or "none"
            raise LensError(f"no checkpoint of step {step} among the snapshots of '{table}'; there are: {there}.")
        parts: dict[str, Tensor] = {}
        for name, update in self._adapters[step].read_factors().items():
            parts |= {f"{name}.a": update.a, f"{name}.b": update.b}
            parts |= {} if update.magnitude is None else {f"{name}.magnitude": update.magnitude}
        return parts

    def cost(self) -> dict[str, float]:
        """Empty: nothing was captured during training."""
        return {}

    def _read_table(self, name: str) -> pa.Table:
        if name not in self.tables():
            raise LensError(f"checkpoints give no table '{name}'.{suggest_name(name, self.tables())}")
        if name in self._logged:
            return self._logged[name]
        if name == tables.BASE:
            return self._base_table
        if name == tables.SNAPSHOTS:
            return arrow_table([])
        return self._adapter_tables[name]

    @cached_property
    def _adapter_tables(self) -> dict[str, pa.Table]:
        """The weight and spectrum tables, in one pass over the checkpoints."""
        weights: list[tuple[int, Captured]] = []
        spectral: list[tuple[int, Captured]] = []
        before: Sequence[FactorBatch] = ()
        for step, adapter in sorted(self._adapters.items()):
            updates = adapter.read_factors()
            now = batch_factors(self._records, {name: Factors(u.a, u.b) for name, u in updates.items()})
            earlier: Sequence[FactorBatch | None] = before or [None] * len(now)
            norms, spectra = [], []
            for batch, old in zip(now, earlier, strict=True):  # all checkpoints of a run have the same batches
                factors = batch.factors  # of a saved PiSSA adapter both halves, which cancel
                norms.append(adapter_norms(factors, batch.scaling, factors, old.factors if old else None))
                spectra.append(update_spectrum(factors, factors, batch.scaling))
            weights.append((step, self._collect_modules(now, norms)))
            found = self._collect_modules(now, spectra)
            spectral.append((step, replace(found, scalars={**found.scalars, **self._measure_dora_changes(updates)})))
            before = now
        return {tables.WEIGHTS: arrow_table(weights), tables.SPECTRA: arrow_table(spectral)}

    def _collect_modules(self, stacked: Sequence[FactorBatch], parts: Sequence[Mapping[str, Tensor]]) -> Captured:
        """The measures of all module batches, one row per module; a matrix of a batch becomes a vector per module."""
        place = {name: i for i, name in enumerate(name for stack in stacked for name in stack.names)}
        rows = [record.name for record in self._records]
        order = [place[name] for name in rows]
        scalars: dict[str, Tensor] = {}
        vectors: dict[str, list[Tensor]] = {}
        for measure in parts[0]:
            values = [value for part in parts for value in part[measure]]  # one per module
            if parts[0][measure].ndim == 1:
                scalars[measure] = torch.stack(values)[order]
            else:
                vectors[measure] = [values[i] for i in order]
        return Captured(scalars, vectors, rows=rows)

    def _measure_dora_changes(self, updates: Mapping[str, LowRankUpdate]) -> dict[str, Tensor]:
        """DoRA's change of magnitude and direction by module; empty for other adapters, or without the base."""
        if self._base is None or all(update.magnitude is None for update in updates.values()):
            return {}
        changes = torch.full((2, len(self._records)), torch.nan)
        for i, record in enumerate(self._records):
            update, weight = updates[record.name], self._base.read_weight(record)
            if weight is not None and update.magnitude is not None:
                found = dora_change(weight, update.a, update.b, update.factor, update.magnitude)
                changes[:, i] = torch.stack(found)
        return dict(zip(("magnitude_change", "direction_change"), changes, strict=True))

    @cached_property
    def _base_table(self) -> pa.Table:
        """Norm and largest singular value of each base weight, with one weight in memory at a time."""
        assert self._base is not None
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for record in self._records:
            weight = self._base.read_weight(record)
            if weight is not None:
                found[record.name] = matrix_norm(weight), top_singular_value(weight)
        norms, tops = (torch.stack(values) for values in zip(*found.values(), strict=True))
        return arrow_table([(0, Captured({"norm": norms, "top": tops}, rows=list(found)))])
