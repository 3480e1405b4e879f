"""What is merged, and where it may be written: decided without torch, before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training_lens.config.run_config import read_run_config
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.models.location import local_folder
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import BASE_ALONE, find_adapter_run, uses_own_model
from training_lens.utils.files import read_json, sweep_temporaries
from training_lens.utils.names import expand_home

REPORT = "merge.json"
MADE_BY = "training-lens merge"
SHOWN_NAMES = 3  # of files, in a message


@dataclass(frozen=True)
class MergeOptions:
    """What is written, and where."""

    output: Path | None = None  # the folder; None is artifacts/merged of the run (artifacts/delta with `delta`)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the written weights; auto is that of the base's files
    scale: float | None = (
        None  # multiplies the update; 1 is as trained, None: the scale chosen with `training-lens knob`
    )
    delta: bool = False  # write only the differences of the changed weights
    max_shard_size: str = "5GB"  # of a file
    force: bool = False  # replace an output that an earlier merge wrote
    same_base: bool = False  # accept `model.id` as the base of a bare adapter that names another one


def plan_merge(config: TrainingConfig, options: MergeOptions) -> tuple[RunFolder | None, Path, Path]:
    """What `inference.adapter` names, and where its merge goes, once nothing is in the way.

    Raises:
        CheckpointError: there is no such run; ConfigurationError: the options are wrong, or the output is taken.
    """
    run, adapter, base = _find_adapter(config)
    _check_options(options, base)
    if not options.output and run is None:
        raise ConfigurationError("a bare adapter has no run folder to merge into; give --output FOLDER.")
    own = (run.weight_delta if options.delta else run.merged_model) if run else Path()
    output = (expand_home(options.output) if options.output else own).resolve()
    check_output(output, run, adapter, base, options.force)
    if not options.output:  # the parent folder is the run's: remove what killed merges left there
        sweep_temporaries(output.parent, older_than_seconds=86_400)
    return run, adapter, output


def _find_adapter(config: TrainingConfig) -> tuple[RunFolder | None, Path, ModelSection]:
    """The run that is merged (None for a bare adapter folder), its adapter, and the base that this is merged into."""
    name = config.inference.adapter
    if name == BASE_ALONE:
        raise ConfigurationError(
            "inference.adapter: 'none' names no adapter to merge; give a run or an adapter folder."
        )
    if uses_own_model(name):
        return None, expand_home(name), config.model
    run = find_adapter_run(name, config.output.base_output_dir, config.output.named_experiment)
    return run, run.adapter, read_run_config(run).model


def _check_options(options: MergeOptions, base: ModelSection) -> None:
    """Refuse options that are wrong, or that this base does not allow."""
    if options.scale is not None and not (options.scale and math.isfinite(options.scale)):
        raise ConfigurationError(
            f"--scale {options.scale:g}: give a number other than 0, which would be the base itself."
        )
    size = re.fullmatch(r"(\d+) ?[KMGT]B", options.max_shard_size.strip(), re.IGNORECASE)
    if size is None or int(size[1]) == 0:
        raise ConfigurationError(
            f"--max-shard-size {options.max_shard_size}: give a whole number above 0 and a unit, such as 5GB or 500MB."
        )
    if options.delta and base.quantization != "none":
        raise ConfigurationError(
            "--delta: the run trained on quantized weights, so the differences to the base's own would not be its "
            "update. Merge it whole."
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
