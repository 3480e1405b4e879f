"""Finds the run that a name means: a path, an id, an experiment, or `latest`, for every command and for Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path

from training_lens.errors import AdapterError, CheckpointError, ConfigurationError
from training_lens.runs.run_folder import (
    LATEST,
    UNFINISHED,
    RunFolder,
    list_folders,
    list_run_folders,
    runs_folder,
)
from training_lens.utils.formatting import did_you_mean, pluralize
from training_lens.utils.names import expand_home

BASE_ALONE = "none"  # the value of inference.adapter for the base model alone
FEWEST_CHARACTERS = 4  # of an abbreviated id
USUAL_OUTPUTS = Path("outputs")  # the default of output.base_output_dir


def find_run_folders(base_output_dir: str, experiment_name: str | None = None) -> list[RunFolder]:
    """The folders of the runs of one experiment, or of all; a `ConfigurationError` if there is no such experiment."""
    experiments = sorted(path.name for path in list_folders(Path(base_output_dir) / "experiments"))
    if experiment_name is not None and experiment_name not in experiments:
        there = f"there are {', '.join(experiments)}" if experiments else "there is none yet"
        raise ConfigurationError(
            f"no experiment '{experiment_name}' in {base_output_dir}: "
            f"{there}.{did_you_mean(experiment_name, experiments)}"
        )
    names = experiments if experiment_name is None else [experiment_name]
    return [run for name in names for run in list_run_folders(runs_folder(base_output_dir, name))]


def find_run(
    reference: str, base_output_dir: str, experiment_name: str | None = None, *, finished: bool | None = None
) -> RunFolder:
    """The run that `reference` means.

    `reference` is a path to a run folder; a run's id or its first characters; `latest`, the run that started last; or
    an experiment's name, which means the run of it that started last.

    Args:
        experiment_name: look for `latest` and ids in this experiment; None: in all of them.
        finished: what the run is for: True to use its adapter, False to resume it, None to read it. `latest` means the
            same run in all three cases, and is refused if that run cannot be used.

    Raises:
        CheckpointError: no run or several match, or the last one cannot be used; lists what there is.
        ConfigurationError: the reference is empty.
    """
    if not reference.strip():
        raise ConfigurationError("an empty name is given, which means no run; give an id, a folder, or 'latest'.")
    path = expand_home(reference)
    if (path / "metadata").is_dir():
        return RunFolder(path.resolve() if path.name in ("", "..") else path)  # as its name is the run's id
    everywhere = find_run_folders(base_output_dir)
    inside = [run for run in everywhere if experiment_name in (None, run.experiment_name)]
    place = f"experiment {experiment_name} of {base_output_dir}" if experiment_name else base_output_dir
    if reference == LATEST:
        return _take_last(inside, place, finished)
    of_experiment = [run for run in everywhere if run.experiment_name == reference]
    found = _match_ids(reference, inside) or _match_ids(reference, everywhere)
    if of_experiment:
        found.append(_take_last(of_experiment, f"experiment {reference}", None if found else finished))
    return _require_one({run.root: run for run in found}, reference, everywhere, place)


def name_run(run: RunFolder) -> str:
    """What commands that we show call a run: its id where they find it by that, else its folder.

    They find it in `outputs` of the folder in which we run, if no other run and no experiment there has the same name.
    """
    experiments = USUAL_OUTPUTS / "experiments"
    same = [path for path in experiments.glob(f"*/runs/{escape(run.run_id)}") if (path / "metadata").is_dir()]
    is_found = len(same) == 1 and same[0].resolve() == run.root.resolve()
    is_clear = run.run_id != LATEST and not (experiments / run.run_id).is_dir() and not Path(run.run_id).exists()
    return run.run_id if is_found and is_clear else str(run.root)


def _match_ids(reference: str, runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs with that id, else those whose ids start with it."""
    exact = [run for run in runs if run.run_id == reference]
    by_prefix = [run for run in runs if run.run_id.startswith(reference)] if len(reference) >= FEWEST_CHARACTERS else []
    return exact or by_prefix


def _require_one(
    found: Mapping[Path, RunFolder], reference: str, everywhere: Sequence[RunFolder], place: str
) -> RunFolder:
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(
            f"'{reference}' may mean {len(found)} runs; give the folder of one: {', '.join(map(str, found))}."
        )
    beside = [str(p) for p in Path(reference).parent.glob("*/")] if "/" in reference else []
    known = {LATEST, *(run.run_id for run in everywhere), *(run.experiment_name for run in everywhere), *beside}
    raise CheckpointError(
        f"no run '{reference}' in {place} ({pluralize(len(everywhere), 'run')} in all), no experiment of that name, "
        "and no run folder at that path. Give output.base_output_dir if it is elsewhere."
        f"{did_you_mean(reference.rstrip('/'), sorted(known - {reference.rstrip('/')}))}"
    )


def _take_last(runs: Sequence[RunFolder], place: str, finished: bool | None) -> RunFolder:
    """The run that started last, if it is finished or unfinished as asked."""
    if not runs:
        raise CheckpointError(
            f"no run in {place} yet. Train one, give output.base_output_dir and output.experiment_name if it is "
            "elsewhere, or the run's path."
        )
    last, *earlier = sorted(runs, key=lambda run: (run.start_time, run.run_id), reverse=True)
    require_usable(
        (last.run_id, read_status(last)), ((run.run_id, read_status(run)) for run in earlier), place, finished
    )
    return last


def require_usable(
    last: tuple[str, str], earlier: Iterable[tuple[str, str]], place: str, finished: bool | None
) -> None:
    """Refuse what `latest` means, the run that started last, where it cannot be used; another is never taken instead.

    `last` is its id and status, `earlier` those of the others, the newest first; `finished` as in `find_run`.
    """
    run_id, status = last
    usable, what = (("finished",), "finished") if finished else (UNFINISHED, "unfinished")
    if finished is None or status in usable:
        return
    other = next((run_id for run_id, status in earlier if status in usable), None)
    instead = f"The last {what} one is {other}" if other else f"No run in {place} is {what}"
    can_resume = finished and status in ("interrupted", "failed")
    remedy = f" To finish {run_id}: training-lens train --resume {run_id}" if can_resume else ""
    raise CheckpointError(
        f"the run that started last in {place} is {run_id} ({status}); expected one that is {what}. {instead}.{remedy}"
    )


def read_status(run: RunFolder) -> str:
    """The run's status; 'unknown' if its summary cannot be read."""
    try:
        return run.status
    except CheckpointError:
        return "unknown"


def find_adapter_run(adapter: str, base_output_dir: str, experiment_name: str | None = None) -> RunFolder:
    """The run with a finished adapter that `inference.adapter` names.

    Raises:
        CheckpointError: see `find_run`; or the run has no finished adapter.
        AdapterError: it is a folder of neither an adapter nor a run.
    """
    try:
        run = find_run(adapter, base_output_dir, experiment_name, finished=True)
    except CheckpointError:
        if expand_home(adapter).is_dir():
            raise AdapterError(
                f"inference.adapter: '{adapter}' holds neither adapter_config.json (an adapter folder) nor metadata/ "
                "(a run's folder)."
            ) from None
        raise
    run.require_adapter()
    return run


def uses_own_model(adapter: str) -> bool:
    """Whether model, template and domains come from the config, because `inference.adapter` names no run."""
    return adapter == BASE_ALONE or (expand_home(adapter) / "adapter_config.json").is_file()
