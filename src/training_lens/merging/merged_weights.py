"""Whether each written weight is the base's with the adapter's update, rounded once, and each other one the base's."""

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
from training_lens.merging.verification import Check
from training_lens.merging.weight_update import ROUNDOFF, LowRank, Whole, saved_updates
from training_lens.models.factory import load_model
from training_lens.models.quantization import dequantize
from training_lens.utils.devices import DTYPES, Precision

BLOCK = 2**22  # weights at a time: 32 MB in float64
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """What was written, and of what: a folder with `base` + `scale` x the update of `adapter`, or that alone (`delta`).

    `device` is where the adapter computed: the base's weights are taken from there, as quantized ones depend on it.
    """

    folder: Path
    base: ModelSection
    adapter: Path
    device: torch.device
    dtype: Precision
    scale: float
    delta: bool


def check_weights(written: Written) -> tuple[Check, Check]:
    """Hold every written number w against its own sum v = W + scale dW in float64, of the base's and adapter's files.

    The first check is the largest |w - v| / (h + e), where h is half the distance of the numbers of w's type around v,
    and e what float32 may lose in computing v. The second counts weights without update that are not W, rounded.
    Memory: the base in float32, and blocks; the written weights are mapped from their files. Cost: one pass.

    Raises:
        MergeError: the written weights cannot be loaded, or the adapter's file names weights that the base has not.
    """
    base = dequantize(load_model(written.base, written.device, "fp32"))
    weights, updates = base.state_dict(), saved_updates(written.adapter)
    if unknown := sorted(updates.keys() - weights.keys()):
        raise MergeError(
            f"{written.adapter} has an update of '{unknown[0]}', and {written.base.id} no such weight, so what was "
            "merged cannot be checked. Save the adapter again, from this base under this version of PEFT."
        )
    found = _differences(written.folder) if written.delta else _merged(written)
    wrong = sorted(
        found.keys() - updates.keys() if written.delta else _changed_others(written, found, weights, updates)
    )
    found = _twins(found, weights) | found
    errors = {name: _error(written, found.get(name), base, name, update) for name, update in updates.items()}
    worst = max(errors, key=errors.__getitem__)
    return (
        Check("changed weights: largest error, in roundings", errors[worst], 1.0, worst),
        Check("other weights that are not the base's, rounded", float(len(wrong)), 0.0, ", ".join(wrong[:3])),
    )


def _merged(written: Written) -> Weights:
    """The merged folder's weights, as any program would load them."""
    plain = {"id": str(written.folder), "revision": None, "quantization": "none", "dtype": written.dtype}
    try:
        model = load_model(written.base.model_copy(update=plain), torch.device("cpu"), written.dtype)
    except ModelLoadingError as error:
        raise MergeError(f"what was written cannot be loaded: {error}") from error
    weights: Weights = model.state_dict()
    return weights


def _differences(folder: Path) -> Weights:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("delta*.safetensors")) for name, t in load_file(file).items()}


def _twins(found: Weights, weights: Weights) -> Weights:
    """For every weight of the base that is one with a found one: what was found of that."""
    places = {weights[name].data_ptr(): tensor for name, tensor in found.items() if name in weights}
    return {name: places[weight.data_ptr()] for name, weight in weights.items() if weight.data_ptr() in places}


def _changed_others(written: Written, found: Weights, weights: Weights, updates: Any) -> Iterator[str]:
    """Names without update, of either side, whose numbers are not the base's in the written type."""
    for name in (found.keys() | weights.keys()) - updates.keys():
        here, before = found.get(name), weights.get(name)
        if here is None or before is None:
            yield name
            continue
        rounded = before.cpu().to(DTYPES[written.dtype] if before.is_floating_point() else before.dtype)
        if not torch.equal(here, rounded.to(here.dtype)):
            yield name


def _error(written: Written, found: Tensor | None, base: Any, name: str, update: LowRank | Whole) -> float:
    """The largest error of one changed weight over what is allowed; infinite where it is missing or no number."""
    before = base.get_parameter(name).detach().cpu()
    if found is None or found.shape != before.shape:
        return math.inf
    # PEFT's A and B map inputs to outputs; Conv1D and embeddings keep their weights as (in, out).
    module = base.get_submodule(name.rpartition(".")[0])
    if isinstance(update, LowRank) and not isinstance(module, torch.nn.Linear):
        found, before = found.T, before.T
    largest = 0.0
    for rows in _blocks(before):
        weight = before[rows].double()
        change, noise = update.change(weight, rows)
        kept, change = 0 * weight if written.delta else weight, written.scale * change
        wanted = kept + change
        noise = abs(written.scale) * noise + 2 * ROUNDOFF * (kept.abs() + change.abs())
        share = (found[rows].double() - wanted).abs() / (_half_step(wanted, DTYPES[written.dtype]) + noise)
        largest = max(largest, share.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return largest


def _blocks(weight: Tensor) -> Iterator[slice]:
    length = max(1, BLOCK * len(weight) // weight.numel())
    return (slice(start, start + length) for start in range(0, len(weight), length))


def _half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of the numbers of `dtype` around each value: what rounding to the nearest may change."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(value).exponent  # |value| = mantissa x 2^exponent, mantissa in [1/2, 1)
    step = limits.eps * torch.exp2(exponent.double() - 1)
    return step.clamp(min=limits.eps * limits.smallest_normal) / 2
