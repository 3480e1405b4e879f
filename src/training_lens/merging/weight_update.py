"""What a saved adapter adds to each weight, from its own file and in float64: to hold merged weights against.

Nothing of `merging` or of PEFT's layers is used here, so that a mistake there is no mistake here.
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
class LowRank:
    """s B A of LoRA (arXiv 2106.09685); with `magnitude` m, DoRA's m (W + s B A) / |W + s B A| - W (arXiv 2402.09353).

    `a` is (rank, in), `b` (out, rank), `magnitude` (out,); `factor` is s.
    """

    a: Tensor
    b: Tensor
    factor: float
    magnitude: Tensor | None

    def change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """What is added to rows of a weight, and by how much the same may differ where it is computed in float32.

        The bound is that of sums of n terms with random rounding, 4 sqrt(n) roundoffs (Higham and Mary 2019, SIAM
        J. Sci. Comput. 41(5)), and 8 for the steps around them, of the absolute values that are summed.

        Args:
            weight: the base's rows (len, in), float64; `rows` says which they are.
        """
        a, b = self.a.double(), self.b[rows].double()
        update, summed = self.factor * (b @ a), abs(self.factor) * (b.abs() @ a.abs())  # (len, in)
        if self.magnitude is None:
            return update, _bound(len(a)) * summed
        before = weight + update
        stretch = (self.magnitude[rows].double() / before.norm(dim=1))[:, None]  # (len, 1)
        noise = _bound(sum(a.shape)) * (stretch.abs() * (weight.abs() + summed) + weight.abs())
        return stretch * before - weight, noise


@dataclass(frozen=True)
class Whole:
    """A parameter that was trained itself: `trained` is what it is now."""

    trained: Tensor

    def change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `LowRank.change`, of a weight of any shape, sliced along its first dimension."""
        trained = self.trained[rows].double()
        return trained - weight, _bound(0) * (trained.abs() + weight.abs())


def _bound(terms: int) -> float:
    return (8 + 4 * math.sqrt(terms)) * ROUNDOFF


def saved_updates(folder: Path) -> dict[str, LowRank | Whole]:
    """The updates of an adapter folder that `adapters.load_adapter` has taken, by the names of the model's weights."""
    from safetensors.torch import load_file

    settings, tensors = read_config(folder), load_file(folder / WEIGHTS)
    low_rank = low_rank_keys(tensors)
    updates: dict[str, LowRank | Whole] = {}
    for path, keys in low_rank.items():
        parts = {part: tensors.pop(key) for part, key in keys.items()}
        factor = scaling_of(path, len(parts["A"]), settings)
        updates[f"{path}.weight"] = LowRank(parts["A"], parts["B"], factor, parts.get("magnitude_vector"))
    for key, tensor in tensors.items():
        if not key.endswith(".base_layer.weight"):  # PEFT may save an adapted embedding's own weights, too
            updates[key.removeprefix(PREFIX)] = Whole(tensor)
    return updates


def low_rank_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of the names in an adapter's file, those of low-rank parts: module path -> A, B, magnitude_vector -> name."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        path, low_rank, part = key.removeprefix(PREFIX).partition(".lora_")
        if low_rank:
            found[path][part.removeprefix("embedding_").removesuffix(".weight")] = key
    return found


def scaling_of(path: str, rank: int, settings: Mapping[str, Any]) -> float:
    """s of a module: alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv 2312.03732).

    Args:
        settings: the content of adapter_config.json.
    """
    patterns = settings.get("alpha_pattern") or {}
    pattern = pattern_of(path, patterns)
    alpha = patterns[pattern] if pattern else settings["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
