"""Whether a GGUF file holds what it should, and whether llama.cpp computes with it what the adapter does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training_lens.adapter_export import llama_reload
from training_lens.adapter_export.gguf_files import Kind, choose_kind
from training_lens.adapter_export.gguf_package import load_tensor, read_tensors
from training_lens.adapter_export.gguf_tensors import GgufNames, convert_weights
from training_lens.adapter_export.model_ends import find_head, has_tied_ends
from training_lens.adapter_export.other_programs import compute_elsewhere
from training_lens.merging.verification import MergeCheck, Probes, Reference, Verification, compare_outputs
from training_lens.merging.weight_update import ROUNDOFF, RowsUpdate, Update, is_stored_turned

# The spacing of numbers around 1, and the smallest spacing, of each kind.
SPACING = {"f32": (2.0**-23, 2.0**-149), "f16": (2.0**-10, 2.0**-24), "bf16": (2.0**-7, 2.0**-133)}
BLOCK = 32  # numbers that share a factor in q8_0
NO_LLAMA = "llama_cpp is not installed here: pip install llama-cpp-python, and export again to compare"


def check_gguf_weights(
    path: Path, base: Any, updates: Mapping[str, Update], scale: float, kind: Kind
) -> tuple[MergeCheck, MergeCheck]:
    """Compare every stored number with W + scale dW, computed in float64 from the base's and the adapter's weights.

    The first check is the largest error over what one rounding to the tensor's kind may change, and float32 on the
    way. The second counts tensors that only one side has. Memory: one tensor in float64, beside the base.
    """
    names, stored = GgufNames.find(base.config), read_tensors(path)
    ends = [updates[name] for name in updates.keys() & _end_names(base)]
    is_tied = has_tied_ends(base) and all(isinstance(end, RowsUpdate) for end in ends)  # those of new tokens are alike
    wanted = convert_weights(names, base, _update_weights(base, updates, scale), is_tied=is_tied)
    errors, lost = {"": 0.0}, []
    for name, tensor in wanted:
        found = load_tensor(stored.pop(name)) if name in stored else None
        if found is None or found.shape != tensor.shape:
            lost.append(name)
            continue
        errors[name] = _largest_error(found, tensor.double(), choose_kind(name, tensor, kind))
    worst = max(errors, key=errors.__getitem__)
    lost += stored.keys()
    return (
        MergeCheck("stored weights: largest error, in roundings", errors[worst], 1.0, worst),
        MergeCheck("weights that are missing or not the model's", float(len(lost)), 0.0, ", ".join(lost[:3])),
    )


def _end_names(model: Any) -> set[str]:
    embedding = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    return {f"{embedding}.weight", f"{find_head(model)}.weight"}


def _update_weights(base: Any, updates: Mapping[str, Update], scale: float) -> Iterator[tuple[str, Tensor]]:
    """The base's weights with the updates, one after the other, in float64 where they change."""
    for name, weight in base.state_dict().items():
        update = updates.get(name)
        if update is None:
            yield name, weight
            continue
        is_turned = is_stored_turned(update, base.get_submodule(name.rpartition(".")[0]))
        before = (weight.mT if is_turned else weight).double()
        after = before + scale * update.compute_change(before, slice(None))[0]
        yield name, after.mT if is_turned else after


def _largest_error(found: Tensor, wanted: Tensor, kind: Kind) -> float:
    size = wanted.abs()
    if kind == "q8_0":
        largest = size.unflatten(-1, (-1, BLOCK)).amax(-1, keepdim=True).expand(*size.shape[:-1], -1, BLOCK).flatten(-2)
        rounding = largest / 127 / 2 + size * 2.0**-10  # the factor is an f16
    else:
        step, smallest = SPACING[kind]
        rounding = (size * step).clamp(min=smallest) / 2
    noise = 16 * ROUNDOFF * size.max()  # of the sum, in float32
    error = (found.double() - wanted).abs() / (rounding + noise)
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()) if error.numel() else 0.0


@dataclass(frozen=True)
class LlamaJob:
    """GGUF files for llama.cpp, and what it is asked besides the probes."""

    model: Path
    adapter: Path | None
    stop_ids: list[int]
    texts: Mapping[str, list[int]]  # with the tokens that the tokenizer of transformers splits them into


def compute_in_llama_cpp(job: LlamaJob, given: Probes, wanted: Reference, kind: Kind) -> Verification:
    """Let llama.cpp compute the probes in a process of its own, and compare.

    Raises:
        MergeError: llama.cpp cannot load the files.
    """
    longest = max([*map(len, given.rows), *(len(ids) + limit for ids, limit in given.prompts)])
    files = {"model": str(job.model), "adapter": str(job.adapter) if job.adapter else None}
    asked = {**files, "positions": longest + 8, "stop_ids": job.stop_ids, "texts": list(job.texts)}
    found = compute_elsewhere("llama.cpp", llama_reload.__file__, asked, given)
    verification = compare_outputs(found.logits, found.answers, wanted, f"llama.cpp {kind}", "none")
    split = sum(mine != theirs for mine, theirs in zip(job.texts.values(), found.others["tokens"], strict=True))
    texts = MergeCheck("texts that llama.cpp splits into other tokens", float(split), 0.0)
    return Verification(**{**vars(verification), "checks": (texts, *verification.checks)})
