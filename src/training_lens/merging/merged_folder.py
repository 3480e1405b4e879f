"""The folder that a merge writes: where it may be, and its files, for a merged model or for a delta alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from training_lens.config.schema import ModelSection
from training_lens.errors import ConfigurationError, MergeError
from training_lens.inference.session import Session
from training_lens.merging.merge_tensors import MergedModel, merge_weights, save_delta, save_merged
from training_lens.models.base_files import copy_beside, save_tokenizer, write_generation_config
from training_lens.models.base_record import local_folder, require_local_folder
from training_lens.models.location import locate_model
from training_lens.models.model_classes import public_class
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.devices import DTYPES, Precision
from training_lens.utils.files import read_json, write_text
from training_lens.utils.formatting import format_size

REPORT = "merge.json"
MADE_BY = "training-lens merge"
SHOWN_NAMES = 3  # of files, in a message


@dataclass(frozen=True)
class MergeOptions:
    """What is written, and where.

    Attributes:
        output: the folder; None is artifacts/merged of the run (artifacts/delta with `delta`).
        dtype: of the written weights; auto is that of the base's files.
        scale: multiplies the adapter's update; 1 is as trained.
        delta: write only the differences of the changed weights.
        max_shard_size: of a file, such as '5GB'.
        force: replace an output that an earlier merge wrote.
        same_base: accept `model.id` as the base of a bare adapter that names another one.
    """

    output: Path | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    scale: float = 1.0
    delta: bool = False
    max_shard_size: str = "5GB"
    force: bool = False
    same_base: bool = False


def write_folder(session: Session, folder: Path, options: MergeOptions, dtype: Precision) -> bool:
    """Write all files of the output but the report, by the options; the session's model is used up.

    Args:
        dtype: of the written weights; with the option auto, the most common dtype of the base's files, and each weight
            of a whole model keeps its own.

    Returns:
        Whether tied weights became untied.

    Raises:
        AdapterError: see `merge_weights`; MergeError: there is not enough space.
    """
    merged = merge_weights(session.model, options.scale, delta=options.delta)
    _require_space(merged, options.delta, folder, DTYPES[dtype])
    if options.delta:
        save_delta(merged, folder, DTYPES[dtype], options.max_shard_size)
    else:  # with the base's own config, tokenizer and chat template, and the session's stop tokens
        base = session.config.model
        own, trusted = require_local_folder(base), base.trust_remote_code
        save_merged(merged, base, folder, None if options.dtype == "auto" else dtype, options.max_shard_size)
        save_tokenizer(session.tokenizer, folder, own, trusted)
        write_generation_config(own, folder, merged.model, session.stop_ids, session.pad_id)
        copy_beside(own, folder, trusted)
    scaled = "" if options.scale == 1 else f", its update times {options.scale:g}"
    what = f"The adapter {session.adapter}{scaled}, merged into {session.config.model.id}; weights in {dtype}."
    readme = _delta_readme(session, what, merged.is_untied) if options.delta else _merged_readme(what, merged.is_untied)
    write_text(folder / "README.md", readme)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its files private to their owner, and a server is often another user
    return merged.is_untied


def _require_space(merged: MergedModel, delta: bool, folder: Path, dtype: torch.dtype) -> None:
    model = merged.model
    written = [model.get_parameter(name) for name in merged.changed] if delta else list(model.parameters())
    needed, free = sum(p.numel() for p in written) * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"the result takes {format_size(needed)}, and {folder.parent} has {format_size(free)} left. Free some "
            "space, or give --output on another disk."
        )


def _merged_readme(description: str, untied: bool) -> str:
    parted = " Embedding and head, one weight in the base, are two here." if untied else ""
    return f"# Merged model\n\n{description}{parted} Checked against the adapter: see {REPORT}.\n"


def _delta_readme(session: Session, description: str, untied: bool) -> str:
    untie = "head = model.get_output_embeddings()\nhead.weight = torch.nn.Parameter(head.weight.clone())\n"
    base, name = locate_model(session.config.model), public_class(session.model)
    return (
        f"# Difference to a base model\n\n{description} Add this to the base's weights; checked, see {REPORT}.\n\n"
        "```python\nimport glob, torch\nfrom safetensors.torch import load_file\n"
        f"from transformers import {name}\n\n"
        f'model = {name}.from_pretrained("{base}", dtype=torch.float32).requires_grad_(False)\n'
        f'{untie if untied else ""}for file in glob.glob("delta*.safetensors"):\n'
        "    for name, difference in load_file(file).items():\n"
        "        model.get_parameter(name).add_(difference.float())\n```\n"
    )


def output_marks(folder: Path) -> dict[str, Any]:
    """The part of the report of a finished `folder` by which `--force` later knows what it may replace."""
    return {"made_by": MADE_BY, "files": sorted([*_list_files(folder), REPORT])}


def check_output(output: Path, run: RunFolder | None, adapter: Path, base: ModelSection, force: bool) -> None:
    """Refuse an output (a resolved path) that would cost files that no merge wrote.

    Args:
        run: the run that is merged; `adapter` is its folder, and `base` the base that it is merged into.
        force: an earlier merge may be replaced, if it wrote every file that is there.

    Raises:
        ConfigurationError: it overlaps the run's, the adapter's or the base's files, or holds other files already.
    """
    kept = {"the adapter": adapter}
    if run:
        names = ("tokenizer", "checkpoints", "logs", "metadata", "reports")
        kept |= {f"the run's {name}": getattr(run, name) for name in names} | {"the run's lens": run.root / "lens"}
    if stored := local_folder(base):
        kept["the base model"] = stored
    for what, protected in kept.items():
        there = protected.resolve()
        if there == output or there in output.parents or output in there.parents:
            way = "is" if there == output else "lies in" if there in output.parents else "holds"
            raise ConfigurationError(f"--output {output} {way} {what} ({there}), which stays. Give another folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    foreign = _foreign_files(output)
    if foreign:
        more = f" and {len(foreign) - SHOWN_NAMES} more" if len(foreign) > SHOWN_NAMES else ""
        raise ConfigurationError(
            f"--output {output}: no merge wrote {', '.join(foreign[:SHOWN_NAMES])}{more}. Move that away, or "
            "give another folder."
        )
    if not force:
        raise ConfigurationError(f"{output} holds a merged model already. Give --force to replace it, or --output.")


def _foreign_files(output: Path) -> list[str]:
    """Names of files in the folder (or of a file in its place) that no earlier merge's report lists."""
    if not output.is_dir():
        return [output.name]
    try:
        report = read_json(output / REPORT)
    except (OSError, ValueError):
        report = None
    ours = isinstance(report, dict) and report.get("made_by") == MADE_BY
    return sorted(set(_list_files(output)) - set(report["files"] if ours else ()))


def _list_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]
