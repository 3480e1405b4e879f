"""What is exported, in which form, and where it may be written: decided without torch, before anything is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training_lens.config.schema import ModelSection, TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.merging.merge_plan import check_scale, find_adapter
from training_lens.merging.output_folder import OutputKind, check_output, protected_folders
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.files import sweep_temporaries
from training_lens.utils.names import expand_home

Form = Literal["peft", "plain", "gguf", "mlx"]
Dtype = Literal["auto", "f32", "f16", "bf16", "q8_0"]
EXPORT = OutputKind(
    report="export.json", made_by="training-lens export-adapter", writer="export", content="an exported adapter"
)


@dataclass(frozen=True)
class ExportOptions:
    """The form, and where it is written."""

    to: Form
    output: Path | None = None  # the folder; None is artifacts/exported/{form} of the run
    scale: float | None = None  # multiplies the update; None: the scale chosen with `training-lens knob`, else 1
    force: bool = False  # replace an output that an earlier export wrote
    same_base: bool = False  # accept `model.id` as the base of a bare adapter that names another one
    merged: bool = False  # gguf: the whole model, with the update in its weights
    dtype: Dtype = "auto"  # gguf with `merged`: of the weights; auto is that of the base's files

    @property
    def form(self) -> str:
        """The form in one word, as the folder is called."""
        return f"{self.to}-merged" if self.merged else self.to


@dataclass(frozen=True)
class ExportPlan:
    """What is exported, and the folder that it goes to."""

    run: RunFolder | None  # None: a bare adapter folder
    adapter: Path
    base: ModelSection
    output: Path

    @property
    def kept_report(self) -> Path:
        """Where the report stays when the export is refused."""
        if self.run is None:
            return self.output.with_name(f"{self.output.name}.{EXPORT.report}")
        return self.run.reports / EXPORT.report


def plan_export(config: TrainingConfig, options: ExportOptions) -> ExportPlan:
    """What `inference.adapter` names, and where its export goes, once nothing is in the way.

    Raises:
        CheckpointError: there is no such run; ConfigurationError: the options are wrong, or the output is taken.
    """
    run, adapter, base = find_adapter(config, "export")
    check_scale(options.scale)
    _check_form(options)
    if not options.output and run is None:
        raise ConfigurationError("a bare adapter has no run folder to export into; give --output FOLDER.")
    own = run.exported / options.form if run else Path()
    output = (expand_home(options.output) if options.output else own).resolve()
    check_output(output, protected_folders(run, adapter, base), EXPORT, options.force)
    if not options.output:  # the parent folder is the run's: remove what killed exports left there
        sweep_temporaries(output.parent, older_than_seconds=86_400)
    return ExportPlan(run, adapter, base, output)


def _check_form(options: ExportOptions) -> None:
    """Refuse options that do not go together, and a form whose package is missing."""
    if options.merged and options.to != "gguf":
        raise ConfigurationError("--merged goes with --to gguf; training-lens merge writes a plain folder.")
    if options.dtype != "auto" and not options.merged:
        raise ConfigurationError("--dtype goes with --to gguf --merged; an adapter is written in float32.")
    if options.to == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ConfigurationError("--to gguf: needs the package gguf: pip install 'training-lens[gguf]'.")
