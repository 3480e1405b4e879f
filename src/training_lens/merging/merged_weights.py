"""Check each written weight: the base's plus the adapter's update, rounded once, or else the base's alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.schema import ModelSection
from training_lens.errors import MergeError, ModelLoadingError
from training_lens.merging.reload import load_delta
from training_lens.merging.verification import MergeCheck
from training_lens.merging.weight_update import ROUNDOFF, LowRankUpdate, WholeUpdate, load_updates
from training_lens.models.factory import load_model
from training_lens.models.quantization import dequantize_model
from training_lens.utils.devices import DTYPES, Precision

BLOCK = 2**22  # weights at a time: 32 MB in float64
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MergeOutput:
    """A written folder and its sources: `base` + `scale` x the update of `adapter`, or with `delta` that alone."""

    folder: Path
    base: ModelSection
    adapter: Path
    device: torch.device  # where the adapter computed; the base is read there, as quantized weights depend on it
    dtype: Precision
    scale: float
    delta: bool


def check_weights(written: MergeOutput) -> tuple[MergeCheck, MergeCheck]:
    """Compare every written number w with v = W + scale dW, computed in float64 from the base's and adapter's files.

    The first check is the largest |w - v| / (h + e), where h is half the spacing of w's dtype around v, and e the error
    bound of computing v in float32. The second counts weights without update that are not W, rounded. Memory: the base
    in float32, and blocks; the written weights are mapped from their files. Cost: one pass.

    Raises:
        MergeError: the written weights cannot be loaded, or the adapter's file names weights that the base lacks.
    """
    base = dequantize_model(load_model(written.base, written.device, "fp32"))
    weights, updates = base.state_dict(), load_updates(written.adapter)
    if unknown := sorted(updates.keys() - weights.keys()):
        raise MergeError(
            f"{written.adapter} has an update of '{unknown[0]}', and {written.base.id} no such weight, so what was "
            "merged cannot be checked. Save the adapter again, from this base under this version of PEFT."
        )
    found = load_delta(written.folder) if written.delta else _load_merged(written)
    others = found.keys() - updates.keys() if written.delta else _find_changed_others(written, found, weights, updates)
    wrong = sorted(others)
    places = {weights[name].data_ptr(): tensor for name, tensor in found.items() if name in weights}
    found = {n: places[w.data_ptr()] for n, w in weights.items() if w.data_ptr() in places} | found  # tied ones, too
    errors = {name: _largest_error(written, found.get(name), base, name, update) for name, update in updates.items()}
    worst = max(errors, key=errors.__getitem__)
    return (
        MergeCheck("changed weights: largest error, in roundings", errors[worst], 1.0, worst),
        MergeCheck("other weights that are not the base's, rounded", float(len(wrong)), 0.0, ", ".join(wrong[:3])),
    )


def _load_merged(written: MergeOutput) -> Weights:
    """The weights of the merged folder, as any program would load them."""
    plain = {"id": str(written.folder), "revision": None, "quantization": "none", "dtype": written.dtype}
    try:
        model = load_model(written.base.model_copy(update=plain), torch.device("cpu"), written.dtype)
    except ModelLoadingError as error:
        raise MergeError(f"what was written cannot be loaded: {error}") from error
    weights: Weights = model.state_dict()
    return weights


def _find_changed_others(written: MergeOutput, found: Weights, weights: Weights, updates: Any) -> Iterator[str]:
    """Names without update, on either side, whose values are not the base's in the written dtype."""
    for name in (found.keys() | weights.keys()) - updates.keys():
        here, before = found.get(name), weights.get(name)
        if here is None or before is None:
            yield name
            continue
        rounded = before.cpu().to(DTYPES[written.dtype] if before.is_floating_point() else before.dtype)
        if not torch.equal(here, rounded.to(here.dtype)):
            yield name


def _largest_error(
    written: MergeOutput, found: Tensor | None, base: Any, name: str, update: LowRankUpdate | WholeUpdate
) -> float:
    """The largest error of one changed weight over the allowed one; infinite where it is missing or NaN."""
    before = base.get_parameter(name).detach().cpu()
    if found is None or found.shape != before.shape:
        return math.inf
    # PEFT's A and B map inputs to outputs; Conv1D and embeddings keep their weights as (in, out).
    module = base.get_submodule(name.rpartition(".")[0])
    if isinstance(update, LowRankUpdate) and not isinstance(module, torch.nn.Linear):
        found, before = found.T, before.T
    largest = 0.0
    length = max(1, BLOCK * len(before) // before.numel())
    for rows in (slice(start, start + length) for start in range(0, len(before), length)):
        weight = before[rows].double()
        change, noise = update.compute_change(weight, rows)
        kept, change = 0 * weight if written.delta else weight, written.scale * change
        wanted = kept + change
        noise = abs(written.scale) * noise + 2 * ROUNDOFF * (kept.abs() + change.abs())
        share = (found[rows].double() - wanted).abs() / (_half_step(wanted, DTYPES[written.dtype]) + noise)
        largest = max(largest, share.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return largest


def _half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` around each value: the most that rounding to nearest may change."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(value).exponent  # |value| = mantissa x 2^exponent, mantissa in [1/2, 1)
    step = limits.eps * torch.exp2(exponent.double() - 1)
    return step.clamp(min=limits.eps * limits.smallest_normal) / 2
