"""The combined adapter's two files, in PEFT's format, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from training_lens.adapter_export.folded_lora import short_target_names
from training_lens.combining.combine_recipe import Recipe
from training_lens.combining.combined_checks import check_combination
from training_lens.combining.combined_update import CombinedModule, WeightedUpdate, combine_updates
from training_lens.combining.parents import Parent
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError
from training_lens.merging.verification import MergeCheck
from training_lens.merging.weight_update import load_updates, low_rank_keys
from training_lens.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    drop_defaults,
    read_config,
    require_finite,
    saved_shapes,
    with_unit_scale,
)
from training_lens.utils.files import write_json

KEPT = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
)  # of the first adapter's file
Updates = Mapping[str, Sequence[WeightedUpdate]]


@dataclass(frozen=True)
class CombinedAdapter:
    """The combined modules by path. `from_sum` is |combination - weighted sum of the updates| over |that sum|."""

    modules: Mapping[str, CombinedModule]

    @property
    def from_sum(self) -> float:
        apart = sum(module.from_sum**2 for module in self.modules.values())
        whole = sum(module.sum_norm**2 for module in self.modules.values())
        return float((apart / whole) ** 0.5) if whole else 0.0

    @property
    def least_kept(self) -> tuple[str, float]:
        """The module whose rank keeps least of what the method gives it, and the share of the sum of squares."""
        path = min(self.modules, key=lambda name: self.modules[name].energy_kept)
        return path, self.modules[path].energy_kept

    @property
    def ranks(self) -> dict[str, int]:
        return {path: module.rank for path, module in self.modules.items()}

    def count_parameters(self) -> int:
        return sum(module.a.numel() + module.b.numel() for module in self.modules.values())


def combine_modules(updates: Updates, recipe: Recipe, progress: Progress) -> CombinedAdapter:
    """Combine the updates of every module; `updates` by the name of the weight."""
    modules: dict[str, CombinedModule] = {}
    with progress.task(f"combining by {recipe.how}", len(updates)) as advance:
        for name, of_module in updates.items():
            path = name.removesuffix(".weight")
            modules[path] = combine_updates(of_module, recipe, path)
            advance(1)
    return CombinedAdapter(modules)


def write_adapter(combined: CombinedAdapter, parents: Sequence[Parent], base: Any, folder: Path) -> None:
    """Write a LoRA whose every module has alpha = rank, so that its scale is 1, in float32, into an existing folder.

    Args:
        base: the model, without adapters.
    """
    keys: dict[str, dict[str, str]] = {}
    for parent in parents:
        keys |= low_rank_keys(saved_shapes(parent.adapter))
    tensors: dict[str, Tensor] = {}
    for path, module in combined.modules.items():
        tensors |= {keys[path]["A"]: module.a, keys[path]["B"]: module.b}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    first = read_config(parents[0].adapter)
    paths = [path for path, _ in base.named_modules() if path]
    config = {key: first[key] for key in KEPT if first.get(key) is not None}
    config |= {"target_modules": short_target_names(list(combined.modules), paths), "inference_mode": True}
    write_json(folder / CONFIG, with_unit_scale(config, combined.ranks), verbatim=True)
    drop_defaults(folder)
    require_finite(folder)


def verify_adapter(updates: Updates, recipe: Recipe, folder: Path) -> tuple[MergeCheck, ...]:
    """Read the files back, and compare them with what the method defines.

    Raises:
        AdapterError: a check failed, so that nothing may be kept.
    """
    checks = check_combination(updates, recipe, load_updates(folder))
    if failed := [check for check in checks if not check.is_ok]:
        found = "; ".join(f"{c.name}: {c.measured:.3g}, at most {c.allowed:g} ({c.where})" for c in failed)
        raise AdapterError(f"the combination is not what --how {recipe.how} defines, so nothing is kept. {found}.")
    return checks
