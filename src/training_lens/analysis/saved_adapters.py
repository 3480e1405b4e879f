"""Reads saved adapters and base weights from disk: headers are checked first, tensors are read on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training_lens.config.schema import ModelSection
from training_lens.core.modules import module_record
from training_lens.core.types import ModuleRecord
from training_lens.errors import AdapterError, LensError, ModelLoadingError
from training_lens.merging.weight_update import (
    ExpertUpdate,
    LowRankUpdate,
    load_updates,
    low_rank_keys,
    read_rank,
    read_scaling,
)
from training_lens.models.adapter_files import (
    CONFIG,
    WEIGHTS,
    Shapes,
    read_config,
    require_adapter,
    require_plain,
    saved_shapes,
)
from training_lens.models.experts import expert_name, name_wrappers
from training_lens.models.factory import weight_files
from training_lens.models.location import local_folder
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)

# Keys of an adapter's configuration that do not change what B A is.
ELSEWHERE = {
    *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config"),
    *("megatron_core", "runtime_config"),
}


@dataclass(frozen=True)
class SavedAdapter:
    """A PEFT folder with a LoRA or DoRA after `step` steps. `records` are its modules, sorted by layer."""

    folder: Path
    step: int
    records: tuple[ModuleRecord, ...]
    config: Mapping[str, Any]

    def read_factors(self) -> dict[str, LowRankUpdate]:
        """A, B and magnitude by module name, on the CPU, in the dtype of the file."""
        try:
            updates = load_updates(self.folder)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{self.folder / WEIGHTS} is broken ({error}). Copy or save it again.") from error
        found: dict[str, LowRankUpdate] = {}
        for name, update in updates.items():
            if isinstance(update, LowRankUpdate):
                found[name.removesuffix(".weight")] = update
            elif isinstance(update, ExpertUpdate):
                found |= {expert_name(name, number): update.select(number) for number in range(update.experts)}
        return {record.name: found[record.name] for record in self.records}


def open_adapter(folder: Path, step: int = 0) -> SavedAdapter:
    """The adapter in a PEFT folder, from its configuration and the header of its weights.

    Raises:
        AdapterError: files are missing or broken, the weights are not safetensors, or it is not a LoRA or DoRA.
    """
    config = read_config(require_adapter(folder))
    require_plain(config, folder, "the lens", "be read", also=ELSEWHERE)
    shapes = saved_shapes(folder)
    found = low_rank_keys(shapes)
    experts = name_wrappers(found, config)
    records = (
        _build_records(path, keys, shapes, config, folder) for path, keys in found.items() if path not in experts
    )
    own = [record for each in records for record in each]
    own += [r for path, name in experts.items() for r in _build_expert_records(name, found[path], shapes, config)]
    pairs = tuple(sorted(own, key=_natural_order))
    if not pairs:
        raise AdapterError(
            f"{folder / WEIGHTS} holds no pair of LoRA matrices among its {len(shapes)} tensors. Give the folder that "
            "PEFT's save_pretrained wrote."
        )
    return SavedAdapter(folder, step, pairs, config)


def _build_expert_records(
    parameter: str, keys: Mapping[str, str], shapes: Shapes, config: Mapping[str, Any]
) -> list[ModuleRecord]:
    rank, a, b = read_rank(parameter, config), shapes[keys["A"]], shapes[keys["B"]]
    scaling = read_scaling(parameter, rank, config)
    names = [expert_name(parameter, number) for number in range(a[0] // rank)]
    return [module_record(name, (rank, a[1]), (b[0], rank), scaling) for name in names]


def _build_records(
    path: str, keys: Mapping[str, str], shapes: Shapes, config: Mapping[str, Any], folder: Path
) -> list[ModuleRecord]:
    a, b = (shapes.get(keys.get(part, "")) for part in "AB")
    if a is None or b is None or (len(a) == 2 == len(b) and a[0] != b[1]):
        raise AdapterError(
            f"{folder / WEIGHTS}: of {path} A has {a or 'nothing'} and B has {b or 'nothing'}, expected (rank, in) and "
            "(out, rank). Copy or save the adapter again."
        )
    if not len(a) == 2 == len(b):
        logger.info("the lens does not read %s in %s: its adapter is not a pair of matrices", path, folder)
        return []
    variant = "dora" if "magnitude_vector" in keys else "lora"
    return [module_record(path, a, b, read_scaling(path, a[0], config), variant)]


def _natural_order(record: ModuleRecord) -> list[tuple[int, str]]:
    """A sort key that puts layers.10 after layers.9."""
    parts = record.name.replace("[", ".").rstrip("]").split(".")  # of an expert, its number is the last
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def require_alike(adapters: list[SavedAdapter]) -> None:
    """Refuse checkpoints of different runs: name the differing module, both shapes and both folders."""
    first = adapters[0]
    for other in adapters[1:]:
        here, there = ({r.name: (r.rank, r.in_features, r.out_features) for r in x.records} for x in (first, other))
        wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if wrong:
            sizes = [
                "rank {}, {} inputs and {} outputs".format(*shapes[wrong[0]]) if wrong[0] in shapes else "no adapter"
                for shapes in (here, there)
            ]
            raise LensError(
                f"the checkpoints are of different runs: {wrong[0]} has {sizes[0]} in {first.folder}, and {sizes[1]} "
                f"in {other.folder}. Give each run's checkpoints in a separate folder."
            )


class BaseWeights:
    """Reads single weights from the safetensors files of a base model's folder without loading the model.

    `transposed` is whether linear weights are stored as (in, out), as in GPT-2 (PEFT's fan_in_fan_out).
    """

    def __init__(self, folder: Path, *, transposed: bool) -> None:
        self._transposed = transposed
        self._files: dict[str, Path] = {}
        self._shapes: Shapes = {}
        for name in weight_files(folder):
            try:
                with safe_open(folder / name, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), folder / name)
                    self._shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ModelLoadingError(
                    f"{folder / name} is broken or missing ({error}). Download the complete model again."
                ) from error

    def read_weight(self, record: ModuleRecord) -> Tensor | None:
        """W of a module as (out, in), float32, on the CPU; None if the files do not have it."""
        key = self.find_key(record)
        if key is None:
            return None
        with safe_open(self._files[key], "pt") as file:
            weight: Tensor = file.get_tensor(key).float()
        shape = (record.out_features, record.in_features)
        is_transposed = self._transposed if shape[0] == shape[1] else tuple(weight.shape) != shape
        return weight.T if is_transposed else weight

    def find_key(self, record: ModuleRecord) -> str | None:
        """The name of W in the files, whose prefix may be shorter or longer than the module's path; None if missing."""
        wanted, shape = f"{record.name}.weight", (record.out_features, record.in_features)
        matching = [
            key
            for key, found in self._shapes.items()
            if found in (shape, shape[::-1]) and (f".{wanted}".endswith(f".{key}") or f".{key}".endswith(f".{wanted}"))
        ]
        return max(matching, key=lambda key: (key == wanted, len(key)), default=None)


def open_base_weights(adapter: SavedAdapter, base: Path | str | None = None) -> BaseWeights | None:
    """The base weights of an adapter: from `base`, or from the model in its configuration if it is on this machine.

    Args:
        base: a local model folder, or a model id in the local cache of the hub.

    Raises:
        ModelLoadingError: `base` is given and cannot be read.
        LensError: `base` is given, but has none of the adapted weights or is not on this machine.
    """
    reference = base if base is not None else adapter.config.get("base_model_name_or_path")
    if not reference:
        return None
    try:
        folder = local_folder(ModelSection(id=str(reference)))
        weights = BaseWeights(folder, transposed=bool(adapter.config.get("fan_in_fan_out"))) if folder else None
    except ModelLoadingError:
        if base is not None:
            raise
        weights = None
    if base is not None and weights is None:
        raise LensError(f"base '{base}' is neither a folder nor a model id in the hub's local cache.")
    missing = [record.name for record in adapter.records if not (weights and weights.find_key(record))]
    if base is not None and len(missing) == len(adapter.records):
        raise LensError(
            f"base '{base}' has none of the {len(missing)} weights that the adapter in {adapter.folder} changes, for "
            f"example {missing[0]}. Give the folder of the model it was trained on."
        )
    if missing:
        where = "is not on this machine" if weights is None else f"has no weight of {len(missing)} modules"
        logger.info(
            "the base '%s' %s, for example %s: measures relative to it are missing. Give its folder as base.",
            *(reference, where, missing[0]),
        )
    return weights if len(missing) < len(adapter.records) else None


def has_adapter_files(folder: Path) -> bool:
    """Whether a folder has the configuration or weights of any adapter."""
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))
