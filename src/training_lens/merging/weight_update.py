"""What a saved adapter adds to each weight, in float64 from its own file; each merged weight checked against it.

Nothing of `merge_tensors` or of PEFT's layers is used here, so that a bug there is not repeated here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_lens.config.schema import ModelSection
from training_lens.errors import MergeError, ModelLoadingError
from training_lens.merging.reload import load_delta
from training_lens.merging.verification import MergeCheck
from training_lens.models.adapter_files import WEIGHTS, read_config
from training_lens.models.embedding_rows import rows_of_adapter
from training_lens.models.experts import name_wrappers
from training_lens.models.factory import load_model
from training_lens.models.quantization import dequantize_model
from training_lens.models.targets import pattern_of
from training_lens.utils.devices import DTYPES, Precision

PREFIX = "base_model.model."  # of every name in PEFT's files
NEW_ROWS = ".token_adapter.trainable_tokens_delta"  # which are the new values, not differences
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
class ExpertUpdate:
    """s B_e A_e of each expert e of a parameter; A and B hold those of all, see `models.experts`."""

    a: Tensor  # (experts x rank, in)
    b: Tensor  # (out, rank x experts)
    factor: float  # s
    experts: int

    @property
    def rank(self) -> int:
        """Of each expert."""
        return len(self.a) // self.experts

    def compute_change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `LowRankUpdate.compute_change`, of the experts in `rows`: (experts, out, in) each."""
        each = [self.select(e) for e in range(self.experts)[rows]]
        changes = [update.compute_change(own, slice(None)) for update, own in zip(each, weight, strict=True)]
        updates, noise = zip(*changes, strict=True)
        return torch.stack(updates), torch.stack(noise)

    def select(self, number: int) -> LowRankUpdate:
        """The update of one expert."""
        first = number * self.rank
        return LowRankUpdate(self.a[first : first + self.rank], self.b[:, number :: self.experts], self.factor, None)


@dataclass(frozen=True)
class WholeUpdate:
    """A parameter that was trained itself; `trained` is its new value."""

    trained: Tensor

    def compute_change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `LowRankUpdate.compute_change`, for a weight of any shape, sliced along its first dimension."""
        trained = self.trained[rows].double()
        return trained - weight, _roundoff_bound(0) * (trained.abs() + weight.abs())


@dataclass(frozen=True)
class RowsUpdate:
    """Rows of new tokens that were trained; `trained` (rows, width) are their new values, `ids` which they are."""

    trained: Tensor
    ids: tuple[int, ...]

    def compute_change(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `LowRankUpdate.compute_change`; 0, and exact, for all other rows."""
        change, noise = torch.zeros_like(weight), torch.zeros_like(weight)
        first = rows.start or 0
        for i, trained in zip(self.ids, self.trained.double(), strict=True):
            if 0 <= i - first < len(weight):
                change[i - first] = trained - weight[i - first]
                noise[i - first] = _roundoff_bound(0) * (trained.abs() + weight[i - first].abs())
        return change, noise


def _roundoff_bound(terms: int) -> float:
    return (8 + 4 * math.sqrt(terms)) * ROUNDOFF


Update = LowRankUpdate | ExpertUpdate | WholeUpdate | RowsUpdate


def is_stored_turned(update: Update, module: Any) -> bool:
    """Whether `module` keeps the weight of an update as (in, out): Conv1D, embeddings, and the experts of gpt-oss.

    PEFT's A and B map inputs to outputs.
    """
    if isinstance(update, ExpertUpdate):
        return bool(getattr(module, "is_transposed", False))
    return isinstance(update, LowRankUpdate) and not isinstance(module, torch.nn.Linear)


def load_updates(folder: Path) -> dict[str, Update]:
    """The updates of an adapter folder that `adapters.load_adapter` accepts, by the names of the model's weights."""
    from safetensors.torch import load_file

    settings, tensors = read_config(folder), load_file(folder / WEIGHTS)
    updates: dict[str, Update] = {}
    found = low_rank_keys(tensors)
    experts = name_wrappers(found, settings)
    for path, keys in found.items():
        parts = {part: tensors.pop(key) for part, key in keys.items()}
        if parameter := experts.get(path):
            rank = read_rank(parameter, settings)
            factor = read_scaling(parameter, rank, settings)
            updates[parameter] = ExpertUpdate(parts["A"], parts["B"], factor, len(parts["A"]) // rank)
            continue
        factor = read_scaling(path, len(parts["A"]), settings)
        updates[f"{path}.weight"] = LowRankUpdate(parts["A"], parts["B"], factor, parts.get("magnitude_vector"))
    rows = rows_of_adapter(settings)
    for key in [key for key in tensors if key.endswith(NEW_ROWS)]:
        path = key.removeprefix(PREFIX).removesuffix(NEW_ROWS)
        ids = next((ids for name, ids in rows.items() if path.endswith(name)), [])
        updates[f"{path}.weight"] = RowsUpdate(tensors.pop(key), tuple(ids))
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


def read_rank(path: str, settings: Mapping[str, Any]) -> int:
    """The rank of a module, or of each expert of a parameter, by adapter_config.json."""
    patterns = settings.get("rank_pattern") or {}
    pattern = pattern_of(path, patterns)
    return int(patterns[pattern] if pattern else settings["r"])


def read_scaling(path: str, rank: int, settings: Mapping[str, Any]) -> float:
    """s of a module, by adapter_config.json: alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv 2312.03732)."""
    patterns = settings.get("alpha_pattern") or {}
    pattern = pattern_of(path, patterns)
    alpha = patterns[pattern] if pattern else settings["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


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
    new_tokens: tuple[str, ...] = ()  # that the base got rows for


def check_weights(written: MergeOutput) -> tuple[MergeCheck, MergeCheck]:
    """Compare every written number w with v = W + scale dW, computed in float64 from the base's and adapter's files.

    The first check is the largest |w - v| / (h + e), where h is half the spacing of w's dtype around v, and e the error
    bound of computing v in float32. The second counts weights without update that are not W, rounded. Memory: the base
    in float32, and blocks; the written weights are mapped from their files. Cost: one pass.

    Raises:
        MergeError: the written weights cannot be loaded, or the adapter's file names weights that the base lacks.
    """
    base = dequantize_model(load_model(written.base, written.device, "fp32", written.new_tokens))
    weights, updates = base.state_dict(), load_updates(written.adapter)
    updates |= list_tied_rows(updates, weights)
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


def list_tied_rows(updates: Mapping[str, Update], weights: Mapping[str, Tensor]) -> dict[str, Update]:
    """The same update by the other names of a weight whose rows were trained: it stays one weight."""
    found: dict[str, Update] = {}
    for name, update in updates.items():
        if isinstance(update, RowsUpdate) and name in weights:
            place = weights[name].data_ptr()
            found |= {other: update for other, weight in weights.items() if weight.data_ptr() == place}
    return found


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


def _largest_error(written: MergeOutput, found: Tensor | None, base: Any, name: str, update: Update) -> float:
    """The largest error of one changed weight over the allowed one; infinite where it is missing or NaN."""
    before = base.get_parameter(name).detach().cpu()
    if found is None or found.shape != before.shape:
        return math.inf
    if is_stored_turned(update, base.get_submodule(name.rpartition(".")[0])):
        found, before = found.mT, before.mT
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
