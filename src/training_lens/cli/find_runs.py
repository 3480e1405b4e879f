"""Find the run that a command names: on this machine, or in a mirror, which is copied here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from training_lens.errors import ConfigurationError
from training_lens.utils.names import require_contained

if TYPE_CHECKING:
    from training_lens.config.schema import OutputSection, TrainingConfig
    from training_lens.runs.run_folder import RunFolder


def is_url(reference: str) -> bool:
    """Whether a run is named by a URL."""
    return "://" in reference


def fetch_copy(reference: str, base_output_dir: str, *, finished: bool | None) -> str:
    """The reference itself; for a URL, the folder of a copy under {base_output_dir}/cache/runs, see `fetch_to_read`."""
    if not is_url(reference):
        return reference
    from training_lens.integrations.remote_run import fetch_to_read

    return str(fetch_to_read(reference, base_output_dir, finished=finished).root)


def locate_run(reference: str, output: OutputSection, *, finished: bool | None) -> RunFolder:
    """The run that a reference names, printed for the user; arguments and errors are those of `find_run`."""
    from training_lens.config.run_config import NOT_OURS
    from training_lens.runs.run_lookup import find_run

    here = fetch_copy(reference, output.base_output_dir, finished=finished)
    run = find_run(here, output.base_output_dir, output.named_experiment, finished=finished)
    require_contained(run.root, besides=NOT_OURS)
    announce_run(run)
    return run


def locate_adapter(settings: TrainingConfig) -> TrainingConfig:
    """The settings with the folder of the run that `inference.adapter` names, printed; an adapter folder stays."""
    from training_lens.runs.run_lookup import find_adapter_run, uses_own_model

    output, adapter = settings.output, settings.inference.adapter
    adapter = fetch_copy(adapter, output.base_output_dir, finished=True)
    if uses_own_model(adapter):
        return settings
    run = find_adapter_run(adapter, output.base_output_dir, output.named_experiment)
    announce_run(run)
    return settings.replace_keys(inference={"adapter": str(run.root)})


def is_adapter_folder(reference: str) -> bool:
    """Whether a reference is an adapter without its run."""
    from training_lens.runs.run_lookup import BASE_ALONE, uses_own_model

    return reference != BASE_ALONE and uses_own_model(reference)


def refuse_adapter_folder(reference: str, need: str) -> None:
    """Refuse an adapter without its run where an explanation needs what only a run has, and name what is possible.

    Raises:
        ConfigurationError: the reference is an adapter folder.
    """
    if is_adapter_folder(reference):
        raise ConfigurationError(
            f"{reference} is an adapter without its run, and {need}. With model.id=BASE, explain modules (and "
            "data.validation=ROWS) shows which modules carry its gain, and explain answer which tokens, layers and "
            "modules changed an answer. Runs of training-lens train keep what the rest needs."
        )


def announce_run(run: RunFolder) -> None:
    """Print which run is used: on standard error where a program reads standard output."""
    from training_lens.runs.run_lookup import read_status

    status = read_status(run)
    became = "" if status == "finished" else f" ({status})"
    where = f"of experiment {run.experiment_name}" if run.experiment_name else f"in {run.root}"
    print(f"run {run.run_id} {where}{became}", file=sys.stdout if sys.stdout.isatty() else sys.stderr)
