"""The adapters that are combined, each of a finished run, and what of them cannot be combined rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.combining.combine_recipe import Recipe
from training_lens.combining.combined_update import WeightedUpdate
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.merging.weight_update import LowRankUpdate, load_updates
from training_lens.models.adapter_files import read_config, require_plain
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.integrity import read_sealed

KEY = "training-lens combine"  # in messages of what is refused
BASE, COMBINATION = MODELS = ("base", "combination")  # names in tables, beside those of the runs


@dataclass(frozen=True)
class Parent:
    """One adapter: its run, its name in tables, and its weight. `scale` is the one chosen with `training-lens knob`."""

    run: RunFolder
    name: str
    weight: float

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that the run answers with."""
        return self.run.served_adapter

    @property
    def scale(self) -> float:
        return self.run.adapter_scale


def open_parents(runs: Sequence[RunFolder], recipe: Recipe) -> list[Parent]:
    """The adapters of finished runs, once it is sure from their files that they can be combined.

    Raises:
        ConfigurationError: a run is given twice.
        CheckpointError: a run has no finished adapter, or a damaged one.
        AdapterError: of several bases, or an adapter is not a plain LoRA.
    """
    places = [run.root.resolve() for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise ConfigurationError(f"{twice.root} is given twice. To weigh it more, give --weights.")
    names = [run.run_id for run in runs]
    taken = {*MODELS, *(name for name in names if names.count(name) > 1)}
    parents = [
        Parent(run, str(run.root) if run.run_id in taken else run.run_id, weight)
        for run, weight in zip(runs, recipe.weights, strict=True)
    ]
    for parent in parents:
        parent.run.require_adapter()
        _require_plain_lora(parent)
    for other in parents[1:]:
        _require_same_base(parents[0], other)
    return parents


def _require_plain_lora(parent: Parent) -> None:
    config = read_config(parent.adapter)
    require_plain(config, parent.adapter, KEY, "be combined")
    if config.get("use_dora"):
        raise AdapterError(
            f"{KEY}: {parent.run.root} is a DoRA, whose update depends on the base's weights and has full rank, so no "
            "sum of such updates is a LoRA. Train it again without peft.use_dora."
        )
    if config.get("target_parameters"):
        raise AdapterError(
            f"{KEY}: {parent.run.root} adapts experts in one parameter ({', '.join(config['target_parameters'])}), "
            "which are not combined yet. Train it again with peft.target_parameters=none."
        )


def _require_same_base(first: Parent, other: Parent) -> None:
    """Compare the fingerprints of the bases' weights, as the runs recorded them; a run of old may have none."""
    one, two = (_read_base(parent) for parent in (first, other))
    if one.get("weights") and two.get("weights") and one["weights"] != two["weights"]:
        raise AdapterError(
            f"{KEY}: {first.run.root} was trained on {one.get('id')} and {other.run.root} on {two.get('id')}, and the "
            f"two have different weights (metadata/base.json). An update fits the base that it was trained on alone: "
            "combine runs of one base."
        )


def _read_base(parent: Parent) -> dict[str, Any]:
    record = parent.run.base_record
    return read_sealed(record) if record.is_file() else {}


def read_weighted_updates(parents: Sequence[Parent], recipe: Recipe) -> dict[str, list[WeightedUpdate]]:
    """The weighted updates of each weight of the base that a run adapts, by its name; sorted.

    Raises:
        AdapterError: names the module and the run whose update is not low-rank, or does not fit the others.
    """
    found: dict[str, dict[str, WeightedUpdate]] = {}
    for parent in parents:
        for name, update in load_updates(parent.adapter).items():
            if not isinstance(update, LowRankUpdate) or update.a.dim() != 2:
                raise AdapterError(
                    f"{KEY}: {parent.run.root} has trained '{name}' itself (peft.modules_to_save, "
                    "model.resize_embeddings or data.new_tokens), or adapts it by other tensors than a pair of "
                    "matrices; only low-rank updates add up to one. Train it again without."
                )
            found.setdefault(name, {})[parent.name] = WeightedUpdate(update, parent.weight)
    for name, by_run in found.items():
        _require_fitting(name, by_run, recipe)
    return {name: list(found[name].values()) for name in sorted(found)}


def _require_fitting(name: str, by_run: Mapping[str, WeightedUpdate], recipe: Recipe) -> None:
    module, (first, *others) = name.removesuffix(".weight"), by_run.items()
    for run, one in others:
        shapes = [(len(x.update.b), x.update.a.shape[1]) for x in (first[1], one)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"{KEY}: '{module}' has {shapes[0][0]} outputs and {shapes[0][1]} inputs in {first[0]}, and "
                f"{shapes[1][0]} and {shapes[1][1]} in {run}: their bases differ. Combine runs of one base."
            )
        if recipe.how == "linear" and first[1].rank != one.rank:
            raise ConfigurationError(
                f"--how linear adds A to A and B to B, which takes one rank: '{module}' has {first[1].rank} in "
                f"{first[0]} and {one.rank} in {run}. --how cat adds the updates exactly, --how svd cuts their sum to "
                "one rank."
            )
