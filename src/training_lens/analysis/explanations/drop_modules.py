"""A trained adapter without some of its modules: a folder of its own in PEFT's format, checked by reading it back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
from training_lens.analysis.explanations.loss_path import LossPath
from training_lens.analysis.smaller_adapter import LOSS_TOLERANCE, require_new_folder
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.models.adapter_files import CONFIG, WEIGHTS, read_config
from training_lens.models.embedding_rows import has_token_rows
from training_lens.models.targets import find_paths
from training_lens.utils.files import atomic_folder, write_json
from training_lens.utils.formatting import did_you_mean

PREFIX = "base_model.model."  # of every tensor's name in PEFT's files
RECORD = "dropped.json"  # in the written folder: what was dropped, and the measured losses


@dataclass(frozen=True)
class DroppedAdapter:
    """A written folder: its modules, parameters, and loss beside that of the whole adapter on the same rows."""

    folder: str
    dropped: tuple[str, ...]
    kept: int
    parameters: int
    loss: float
    whole_loss: float


def resolve_modules(names: Sequence[str], adapted: Sequence[str]) -> tuple[str, ...]:
    """The adapted modules that the names mean: whole paths, their endings (`q_proj`), or beginnings (`model.layers.3`).

    Raises:
        ConfigurationError: a name means none, or all together mean every module.
    """
    found: set[str] = set()
    for name in names:
        meant = {*find_paths(adapted, name), *(path for path in adapted if path.startswith(f"{name}."))}
        if not meant:
            last = sorted({path.rsplit(".", 1)[-1] for path in adapted})
            hint = did_you_mean(name, [*last, *adapted])
            raise ConfigurationError(
                f"--drop {name}: no adapted module is called so.{hint} There are {', '.join(last)}."
            )
        found |= meant
    if len(found) == len(adapted):
        raise ConfigurationError("--drop: nothing of the adapter would be left. Name fewer modules.")
    return tuple(path for path in adapted if path in found)


def write_without_modules(
    adapter: ExplainedAdapter,
    folder: Path,
    names: Sequence[str],
    settings: EvaluationSection,
    progress: Progress | None = None,
) -> DroppedAdapter:
    """Write an adapter without some modules, load it as any adapter is loaded, and measure it on the same rows.

    The folder exists under its name only after its loss was found to be the one that was measured in memory.

    Args:
        names: see `resolve_modules`.

    Cost: two forward passes over the rows, and one of the folder read back.

    Raises:
        ConfigurationError: the folder has files, or a name means no module; AdapterError: the check failed.
    """
    require_new_folder(folder)
    measure = _LossMeasurement(adapter, settings.batch_tokens, progress or Progress())
    whole, loss, adapted, dropped = measure.compare(names)
    with atomic_folder(folder, existing="refuse") as building:
        parameters = _write_files(adapter.folder, building, dropped, adapted)
        measured = measure.read_back(building)
        if not abs(measured - loss) <= LOSS_TOLERANCE:
            raise AdapterError(
                f"the adapter without the modules, read back, has the loss {measured:.4f}, and {loss:.4f} was measured "
                "in memory: nothing was written. Report this."
            )
        record = {"source": adapter.source, "dropped": list(dropped), "loss": measured, "whole_loss": whole}
        write_json(building / RECORD, record)
    return DroppedAdapter(str(folder), dropped, len(adapted) - len(dropped), parameters, measured, whole)


@dataclass(frozen=True)
class _LossMeasurement:
    """Measures losses per token on the same rows; a model is in memory only meanwhile."""

    adapter: ExplainedAdapter
    batch_tokens: int
    progress: Progress

    def compare(self, names: Sequence[str]) -> tuple[float, float, tuple[str, ...], tuple[str, ...]]:
        """The loss of the whole adapter and without modules; all modules, and those that are left out.

        Rows of new tokens are none of them: they stay.
        """
        path = self._open(self.adapter.folder)
        every, layers = path.multipliers.names, path.multipliers.layers
        adapted = tuple(n for n, layer in zip(every, layers, strict=True) if not has_token_rows(layer))
        dropped = resolve_modules(names, adapted)
        values = [0.0 if name in dropped else 1.0 for name in every]
        whole = _mean_loss(path, [1.0] * len(every), "loss of the adapter")
        return whole, _mean_loss(path, values, "loss without the modules"), adapted, dropped

    def read_back(self, folder: Path) -> float:
        """The loss of a written folder, loaded as any adapter."""
        path = self._open(folder)
        return _mean_loss(path, [1.0] * len(path.multipliers.names), "loss of the written adapter")

    def _open(self, folder: Path) -> LossPath:
        session, rows = self.adapter.open_with(folder)
        return LossPath(session, rows.dataset, self.batch_tokens, self.progress)


def _mean_loss(path: LossPath, values: Sequence[float], title: str) -> float:
    return float(path.measure_losses(values, title).sum() / path.dataset.supervised_counts.sum())


def _write_files(source: Path, folder: Path, dropped: Collection[str], adapted: Sequence[str]) -> int:
    """The two files of an adapter; returns how many parameters it has."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor
        for name, tensor in load_file(source / WEIGHTS).items()
        if not any(name.removeprefix(PREFIX).startswith(f"{path}.") for path in dropped)
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = _leave_out(read_config(source), dropped, adapted)
    if not settings["target_modules"]:
        raise ConfigurationError(
            "--drop: only modules trained whole would be left, which PEFT cannot load. Name fewer."
        )
    write_json(folder / CONFIG, settings, verbatim=True)
    return sum(tensor.numel() for tensor in tensors.values())


def _leave_out(settings: Mapping[str, Any], dropped: Collection[str], adapted: Sequence[str]) -> dict[str, Any]:
    """The configuration whose targets are the modules that stay.

    Names that only mean modules that stay are kept; others become these modules' whole paths.
    """
    whole = [name for name in settings.get("modules_to_save") or () if any(path.endswith(name) for path in adapted)]
    saved = {path for path in adapted if any(path.endswith(name) for name in whole)}
    targets = settings["target_modules"]
    names = [] if isinstance(targets, str) else [name for name in targets if not find_paths(dropped, name)]
    low_rank = [path for path in adapted if path not in dropped and path not in saved]
    paths = [path for path in low_rank if not any(find_paths([path], name) for name in names)]
    kept_whole = [name for name in whole if not any(path.endswith(name) for path in dropped)]
    return {**settings, "target_modules": sorted({*names, *paths}), "modules_to_save": kept_whole or None}
