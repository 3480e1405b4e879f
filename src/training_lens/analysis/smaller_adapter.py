"""A trained adapter cut to smaller ranks, as a folder of its own in PEFT's format, checked by reading it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training_lens.analysis.findings.rank import RankCheck, RankLoss
from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, ConfigurationError
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.measures.singular_values import energy_rank, singular_values, truncate_rank, update_norm
from training_lens.merging.weight_update import (
    ExpertUpdate,
    LowRankUpdate,
    Update,
    load_updates,
    low_rank_keys,
    read_rank,
    read_scaling,
)
from training_lens.models.adapter_files import CONFIG, WEIGHTS, read_config, require_plain, with_unit_scale
from training_lens.models.experts import name_wrappers, split_a, split_b
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import atomic_folder, write_json
from training_lens.utils.processes import Processes

RECORD = "rank.json"  # in the written folder: what was kept, and the measured losses
ROUNDOFF = 1e-5  # of |dW|: how far a written dW may be from the best approximation
LOSS_TOLERANCE = 0.01  # nats, or of the gain: how far the loss read back may be from the one measured in memory


@dataclass(frozen=True)
class SmallerAdapter:
    """A written folder: what was kept, its parameters, and its loss as any program that loads it has it."""

    folder: str
    keep: str
    parameters: int
    loss: float
    largest_error: float  # over modules, of |dW| against the best approximation of its rank, relative to |dW|


def require_new_folder(folder: Path) -> None:
    """Refuse a place that holds files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--write {folder}: something is there already. Give a new folder.")


def find_truncation(check: RankCheck, keep: str) -> RankLoss:
    """The truncation that `keep` names: `90%` of the energy, or a rank such as `4`.

    Raises:
        ConfigurationError: it was not measured; lists what was.
    """
    known = {at.label: at for at in check.truncations}
    if keep not in known:
        raise ConfigurationError(f"--keep {keep}: was not measured; give one of {', '.join(known)}.")
    return known[keep]


def write_smaller_adapter(
    run: RunFolder, folder: Path, at: RankLoss, gain: float, options: RowOptions, progress: Progress | None = None
) -> SmallerAdapter:
    """Write the run's adapter cut as in `at`, load it as any adapter is loaded, and measure its loss on the same rows.

    Every module gets scaling 1: alpha = rank, in `alpha_pattern` and `rank_pattern` where it differs from the largest.
    The folder exists under its name only after both checks: dW is the best approximation of its rank, from the files
    alone, and the loss is the one that was measured in memory.

    Args:
        gain: of the whole adapter over its base, in nats.

    Raises:
        ConfigurationError: the folder has files; AdapterError: not a plain LoRA or DoRA, or a check failed.
    """
    require_new_folder(folder)
    require_plain(read_config(run.adapter), run.adapter, "training-lens rank", "be cut to smaller ranks")
    with atomic_folder(folder, existing="refuse") as building:
        _write_files(run.adapter, building, at)
        error = _measure_distance(run.adapter, building)
        if not error <= ROUNDOFF:
            raise AdapterError(f"the smaller adapter is not the best of its rank (relative error {error:.3g}).")
        loss = _measure_loss(run, building, options, progress or Progress())
        if not abs(loss - at.loss) <= max(LOSS_TOLERANCE, LOSS_TOLERANCE * abs(gain)):
            raise AdapterError(
                f"the smaller adapter, read back, has the loss {loss:.4f}, and {at.loss:.4f} was measured in memory: "
                "nothing was written. Report this."
            )
        written = SmallerAdapter(str(folder), at.label, at.parameters or 0, loss, error)
        record = {"run": str(run.root), "keep": at.label, "loss": loss, "change": [at.delta, at.low, at.high]}
        write_json(building / RECORD, record)
    return written


def _write_files(source: Path, folder: Path, at: RankLoss) -> None:
    from safetensors.torch import load_file, save_file

    settings, tensors = read_config(source), load_file(source / WEIGHTS)
    ranks: dict[str, int] = {}
    found = low_rank_keys(tensors)
    experts = name_wrappers(found, settings)
    for path, keys in found.items():
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        name = experts.get(path, path)
        rank = read_rank(name, settings) if path in experts else len(a)
        update = read_scaling(name, rank, settings) * b.double()
        small_a, small_b = _cut_experts(a, update, len(a) // rank, at)
        ranks[name] = len(small_a) * rank // len(a)
        for part, tensor in zip("AB", (small_a, small_b), strict=True):
            tensors[keys[part]] = tensor.to(a.dtype).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, with_unit_scale(settings, ranks), verbatim=True)


def _choose_rank(a: Tensor, update: Tensor, at: RankLoss) -> int:
    """At least 1: PEFT has no module of rank 0."""
    return max(1, at.rank or int(energy_rank(singular_values(a, update, 1.0), at.share or 1.0)))


def _cut_factors(a: Tensor, update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the best approximation of `update` @ `a`."""
    small_a, small_b = truncate_rank(a, update, 1.0, rank)
    return small_a[:rank], small_b[:, :rank]


def _cut_experts(a: Tensor, update: Tensor, experts: int, at: RankLoss) -> tuple[Tensor, Tensor]:
    """A and B of a module, or of all experts of a parameter, each cut to its rank and padded to the largest of them."""
    parts = list(zip(split_a(a, experts), split_b(update, experts), strict=True))
    ranks = [min(_choose_rank(*part, at), len(part[0])) for part in parts]
    cut = [truncate_rank(*part, 1.0, rank) for part, rank in zip(parts, ranks, strict=True)]
    kept = max(ranks)
    small_a = torch.cat([one[:kept] for one, _ in cut])
    small_b = torch.stack([other[:, :kept] for _, other in cut], -1).flatten(1)  # (out, rank, experts)
    return small_a, small_b


@torch.no_grad()
def _measure_distance(source: Path, folder: Path) -> float:
    """The largest |dW' - best| / |dW| over modules, from both folders' files, in float64.

    `best` is the best approximation of dW of the rank of dW' (Eckart and Young 1936).
    """
    found, errors = load_updates(folder), [0.0]
    for name, whole in load_updates(source).items():
        for one, cut in zip(_list_pairs(whole), _list_pairs(found[name]), strict=True):
            b, small = one.factor * one.b.double(), cut.factor * cut.b.double()
            best_a, best_b = _cut_factors(one.a, b, int(cut.a.any(1).sum()))
            apart = update_norm(torch.cat([best_a, cut.a.double()]), torch.cat([best_b, -small], 1), 1.0)
            errors.append(float(apart / update_norm(one.a, b, 1.0).clamp(min=1e-30)))
    return max(errors)


def _list_pairs(update: Update) -> list[LowRankUpdate]:
    """The low-rank updates in an update: its own, or one of each expert."""
    if isinstance(update, ExpertUpdate):
        return [update.select(number) for number in range(update.experts)]
    return [update] if isinstance(update, LowRankUpdate) else []


def _measure_loss(run: RunFolder, folder: Path, options: RowOptions, progress: Progress) -> float:
    session, rows = open_rows(run, options, adapter=folder)
    with progress.task("loss of the written adapter", len(rows.examples)) as advance:
        way = EvaluationOptions(Processes(session.device), session.precision, 4096, session.pad_id, advance)
        sums = token_sums(session.model, rows.dataset, way)
    return float(sums.nll.sum() / sums.tokens.sum())
