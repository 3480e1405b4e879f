"""Which run a command means: one of this machine, or a copy of one in a mirror; and saying so."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_lens.config.schema import OutputSection, TrainingConfig
    from training_lens.runs.run_folder import RunFolder


def is_url(reference: str) -> bool:
    """Whether a run is named by a URL; file:// is one of a folder."""
    return "://" in reference


def fetch_copy(reference: str, base_output_dir: str, *, finished: bool | None) -> str:
    """The run that a reference means: of a URL, the folder of a copy under {base_output_dir}/cache/runs.

    Args:
        finished: which run of a mirror is the latest; see `find_run`.

    Raises:
        CheckpointError: there is no such run in the mirror, or it is damaged.
        IntegrationError: no answer.
    """
    if not is_url(reference):
        return reference
    from training_lens.integrations.remote_run import fetch_to_read

    return str(fetch_to_read(reference, base_output_dir, finished=finished).root)


def locate_run(reference: str, output: OutputSection, *, finished: bool | None) -> RunFolder:
    """The run that a reference means, told to the user; arguments and errors are those of `find_run`."""
    from training_lens.config.run_config import NOT_OURS
    from training_lens.runs.run_lookup import find_run
    from training_lens.utils.names import require_contained

    here = fetch_copy(reference, output.base_output_dir, finished=finished)
    run = find_run(here, output.base_output_dir, output.named_experiment, finished=finished)
    require_contained(run.root, besides=NOT_OURS)
    announce_run(run)
    return run


def locate_adapter(settings: TrainingConfig) -> TrainingConfig:
    """The settings with the folder of the run that `inference.adapter` names, told to the user.

    An adapter folder, or no adapter, stays as it is.

    Raises:
        CheckpointError, AdapterError: see `find_adapter_run`.
    """
    from training_lens.runs.run_lookup import find_adapter_run, uses_own_model

    output, adapter = settings.output, settings.inference.adapter
    adapter = fetch_copy(adapter, output.base_output_dir, finished=True)
    if uses_own_model(adapter):
        return settings
    run = find_adapter_run(adapter, output.base_output_dir, output.named_experiment)
    announce_run(run)
    return settings.replace_keys(inference={"adapter": str(run.root)})


def announce_run(run: RunFolder) -> None:
    """Say which run answers: on standard error where standard output is read by a program."""
    from training_lens.runs.run_lookup import read_status

    status = read_status(run)
    became = "" if status == "finished" else f" ({status})"
    where = f"of experiment {run.experiment_name}" if run.experiment_name else f"in {run.root}"
    print(f"run {run.run_id} {where}{became}", file=sys.stdout if sys.stdout.isatty() else sys.stderr)
