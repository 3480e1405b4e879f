"""What a saved adapter adds to each weight, computed in float64 from its own file, to check merged weights against.

Nothing of `merge_tensors` or of PEFT's layers is used here, so that a bug there is not repeated here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training_lens.models.adapter_files import WEIGHTS, read_config
from training_lens.models.targets import pattern_of

PREFIX = "base_model.model."  # of every name in PEFT's files
ROUNDOFF = 2.0**-24  # of one float32 operation, relative


@dataclass(frozen=True)
class LowRankUpdate:
    """s B A of LoRA (arXiv 2106.09685), or DoRA's m (W + s B A) / |W + s B A| - W (arXiv 2402.09353)."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    factor: float  # s
    magnitude: Tensor | None  # m (out,), of DoRA

    def compute_change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The update of some rows of a weight, and a bound of its error when computed in float32.

        The bound is that of sums of n terms with random rounding, 4 sqrt(n) roundoffs (Higham and Mary 2019, SIAM
        J. Sci. Comput. 41(5)), plus 8 for the other steps, times the sum of absolute values. `weight` has those `rows`
        of the base, (len, in), float64.
        """
        a, b = self.a.double(), self.b[rows].double()
        update, summed = self.factor * (b @ a), abs(self.factor) * (b.abs() @ a.abs())  # (len, in)
        if self.magnitude is None:
            return update, _roundoff_bound(len(a)) * summed
        before = weight + update
        stretch = (self.magnitude[rows].double() / before.norm(dim=1))[:, None]  # (len, 1)
        noise = _roundoff_bound(sum(a.shape)) * (stretch.abs() * (weight.abs() + summed) + weight.abs())
        return stretch * before - weight, noise


@dataclass(frozen=True)
class WholeUpdate:
    """A parameter that was trained itself; `trained` is its new value."""

    trained: Tensor

    def compute_change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `LowRankUpdate.compute_change`, for a weight of any shape, sliced along its first dimension."""
        trained = self.trained[rows].double()
        return trained - weight, _roundoff_bound(0) * (trained.abs() + weight.abs())


def _roundoff_bound(terms: int) -> float:
    return (8 + 4 * math.sqrt(terms)) * ROUNDOFF


def load_updates(folder: Path) -> dict[str, LowRankUpdate | WholeUpdate]:
    """The updates of an adapter folder that `adapters.load_adapter` accepts, by the names of the model's weights."""
    from safetensors.torch import load_file

    settings, tensors = read_config(folder), load_file(folder / WEIGHTS)
    updates: dict[str, LowRankUpdate | WholeUpdate] = {}
    for path, keys in low_rank_keys(tensors).items():
        parts = {part: tensors.pop(key) for part, key in keys.items()}
        factor = read_scaling(path, len(parts["A"]), settings)
        updates[f"{path}.weight"] = LowRankUpdate(parts["A"], parts["B"], factor, parts.get("magnitude_vector"))
    for key, tensor in tensors.items():
        if not key.endswith(".base_layer.weight"):  # PEFT may save an adapted embedding's own weights, too
            updates[key.removeprefix(PREFIX)] = WholeUpdate(tensor)
    return updates


def low_rank_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names of low-rank parts in an adapter's file: module path -> A, B, magnitude_vector -> name."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        path, low_rank, part = key.removeprefix(PREFIX).partition(".lora_")
        if low_rank:
            found[path][part.removeprefix("embedding_").removesuffix(".weight")] = key
    return found


def read_scaling(path: str, rank: int, settings: Mapping[str, Any]) -> float:
    """s of a module, by adapter_config.json: alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv 2312.03732)."""
    patterns = settings.get("alpha_pattern") or {}
    pattern = pattern_of(path, patterns)
    alpha = patterns[pattern] if pattern else settings["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
