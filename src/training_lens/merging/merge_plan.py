"""What is merged, and where it may be written: decided without torch, before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training_lens.config.run_config import read_run_config
from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.merging.output_folder import OutputKind, check_output, protected_folders
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import BASE_ALONE, find_adapter_run, uses_own_model
from training_lens.utils.files import sweep_temporaries
from training_lens.utils.names import expand_home

MERGE = OutputKind(report="merge.json", made_by="training-lens merge", writer="merge", content="a merged model")


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
    run, adapter, base = find_adapter(config, "merge")
    _check_options(options, base)
    if not options.output and run is None:
        raise ConfigurationError("a bare adapter has no run folder to merge into; give --output FOLDER.")
    own = (run.weight_delta if options.delta else run.merged_model) if run else Path()
    output = (expand_home(options.output) if options.output else own).resolve()
    check_output(output, protected_folders(run, adapter, base), MERGE, options.force)
    if not options.output:  # the parent folder is the run's: remove what killed merges left there
        sweep_temporaries(output.parent, older_than_seconds=86_400)
    return run, adapter, output


def find_adapter(config: TrainingConfig, doing: str) -> tuple[RunFolder | None, Path, ModelSection]:
    """The run that `inference.adapter` names (None for a bare adapter folder), its adapter, and the adapter's base.

    Args:
        doing: what is done with the adapter, for the message: 'merge'.
    """
    name = config.inference.adapter
    if name == BASE_ALONE:
        raise ConfigurationError(
            f"inference.adapter: 'none' names no adapter to {doing}; give a run or an adapter folder."
        )
    if uses_own_model(name):
        return None, expand_home(name), config.model
    run = find_adapter_run(name, config.output.base_output_dir, config.output.named_experiment)
    return run, run.adapter, read_run_config(run).model


def _check_options(options: MergeOptions, base: ModelSection) -> None:
    """Refuse options that are wrong, or that this base does not allow."""
    check_scale(options.scale)
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


def check_scale(scale: float | None) -> None:
    """Refuse a scale of the update that is 0 or not finite; None is the run's own."""
    if scale is not None and not (scale and math.isfinite(scale)):
        raise ConfigurationError(f"--scale {scale:g}: give a number other than 0, which would be the base itself.")
