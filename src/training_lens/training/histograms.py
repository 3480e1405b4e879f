"""Histograms of the adapter's weights and gradients, for the trackers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.core.modules import adapter_modules, strip_wrappers
from training_lens.errors import LensError
from training_lens.models.adapters import trainable_parameters
from training_lens.training.loop.callbacks import JournalCallback
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
BINS = 32  # from the least to the greatest number
NUMBERS_AT_ONCE = 2**22  # numbers binned together, which takes some 100 MB


class HistogramWriter(JournalCallback):
    """Writes histograms of weights and gradients to histograms.jsonl: at step 1, every `every` steps, and at the last.

    A line is `{"step", "histograms": {"weights": {name: ...}, "gradients": {name: ...}}}`, with histograms of
    `compute_histograms`: of the weights before the step's update, and of the step's gradients before clipping. A
    failure is logged once; the run continues without histograms.

    Args:
        path: the journal.
        every: steps from one line to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        super().__init__(path)
        self._every = every
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        self._parameters = named_parameters(trainer.model)

    def on_gradients(self, trainer: Any, step: int) -> None:
        if self._parameters and (step % self._every == 0 or step in (1, trainer.schedule.total_steps)):
            try:
                self._journal.write({"step": step, "histograms": _step_histograms(self._parameters)})
            except Exception as error:
                self._parameters = {}
                logger.warning(
                    "step %d: no histograms from now on: %s Training continues.", step, describe_error(error)
                )
                logger.debug("in the histograms", exc_info=True)


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name: MODULE.A, MODULE.B, DoRA's MODULE.magnitude; others keep their own name.

    With PiSSA, A and B are the trained halves; those of all experts of a parameter are one.
    """
    try:
        modules = adapter_modules(model)
    except LensError:  # fully trained modules only, or adapters that are no pair of matrices
        modules = ()
    names = {
        id(p): f"{m.name.partition('[')[0]}.{end}"
        for m in modules
        for p, end in zip(m.trained_parameters, _ENDS, strict=False)
    }
    parameters = trainable_parameters(model)
    return {names.get(id(p)) or strip_wrappers(n).replace(".modules_to_save.default", ""): p for n, p in parameters}


_ENDS = ("A", "B", "magnitude")  # of AdapterModule.trained_parameters


def _step_histograms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Histograms of weights and gradients, brought from the device together."""
    tensors = {("weights", name): p.detach() for name, p in parameters.items()}
    tensors |= {("gradients", name): p.grad for name, p in parameters.items() if p.grad is not None}
    found: dict[str, dict[str, Any]] = {"weights": {}, "gradients": {}}
    for (kind, name), histogram in compute_histograms(tensors).items():
        found[kind][name] = histogram
    return found


def compute_histograms(tensors: Mapping[Any, Tensor]) -> dict[Any, dict[str, Any]]:
    """For each tensor `{"counts": [...], "low": x, "high": y}`: counts in 32 equal bins.

    Numbers that are not finite are in no bin; `not_finite` counts them where there are any. If all numbers are equal,
    `low` and `high` are that number, and the last bin holds them all; if none is finite, both are 0.

    Cost: about ten passes over the numbers, batched over tensors of one size, and one synchronization per device.
    """
    alike: dict[tuple[torch.device, int], list[Any]] = defaultdict(list)
    for name, tensor in tensors.items():
        alike[tensor.device, tensor.numel()].append(name)
    tables: dict[torch.device, list[Tensor]] = defaultdict(list)
    names: dict[torch.device, list[Any]] = defaultdict(list)
    for (device, _), group in alike.items():
        rows = [tensors[name].detach().flatten() for name in group]  # a single one, perhaps an embedding: no copy
        tables[device].append(_bin_rows((rows[0][None] if len(rows) == 1 else torch.stack(rows)).float()))
        names[device] += group
    found: dict[Any, dict[str, Any]] = {}
    for device, parts in tables.items():
        for name, row in zip(names[device], torch.cat(parts).cpu().numpy(), strict=True):  # a sync point
            low, high = row[BINS + 1 :].view(np.float32).tolist()
            lost = {"not_finite": int(row[BINS])} if row[BINS] else {}
            found[name] = {"counts": row[:BINS].tolist(), "low": low, "high": high, **lost}
    return {name: found[name] for name in tensors}


def _bin_rows(rows: Tensor) -> Tensor:
    """(tensors, BINS + 3) int32: counts, how many are not finite, and the bits of `low` and `high` in float32."""
    parts = rows.split(max(1, NUMBERS_AT_ONCE // len(rows)), 1)
    low = torch.stack([torch.where(part.isfinite(), part, torch.inf).amin(1) for part in parts]).amin(0)
    high = torch.stack([torch.where(part.isfinite(), part, -torch.inf).amax(1) for part in parts]).amax(0)
    counts = torch.zeros(len(rows), BINS + 1, dtype=torch.int32, device=rows.device)
    for part in parts:
        share = (part - low[:, None]) / (high - low)[:, None]  # 0 to 1; NaN where all numbers are one
        bins = (share * BINS).nan_to_num(BINS - 1).clamp(0, BINS - 1)
        places = torch.where(part.isfinite(), bins, BINS).long()
        counts.scatter_add_(1, places, counts.new_ones(()).expand_as(places))
    ends = [torch.where(end.isfinite(), end, 0.0).float().view(torch.int32)[:, None] for end in (low, high)]
    return torch.cat([counts, *ends], 1)
