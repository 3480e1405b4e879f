"""Reads a study's trials: which belong to the same run, which were lost by a dead process, which are current.

An ended Optuna trial cannot be reopened, so a resumed run is a new trial that refers to the first one. Optuna's own
retry callback writes the new trial after it has failed the old one: a kill in between would lose the trial.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from training_lens.errors import ConfigurationError
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.names import check_run_id

BLOCKS = "block_nll"  # attribute of a trial: its losses summed over blocks of validation rows
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def check_attributes(trial: FrozenTrial) -> None:
    """Refuse attributes that no sweep writes: the database is untrusted data.

    Raises:
        ConfigurationError: names the trial and the attribute.
    """
    numbers = [*(trial.values or ()), *trial.intermediate_values.values(), trial.number]
    misfit = find_type_error("study.db", trial.user_attrs)
    if not misfit and "token" not in trial.user_attrs:
        misfit = "token: it is missing"
    elif not all(isinstance(number, int | float) for number in numbers):
        misfit = f"{numbers}: not all of them are losses"
    elif trial.state == TrialState.COMPLETE and not trial.values:
        misfit = "value: a finished trial has none"
    if misfit:
        raise ConfigurationError(
            f"sweep.name: trial {trial.number} of the study has a wrong attribute. {misfit}. Restore its database, or "
            "give another sweep.name."
        )
    run_id(trial)


def first_number(trial: FrozenTrial) -> int:
    """The displayed number of the trial: that of the first trial of its run."""
    return int(trial.user_attrs.get("continues", trial.number))


def run_id(trial: FrozenTrial) -> str:
    """The id of the trial's run: 'trial-0003-5f3a'. The tail separates studies with the same name.

    Raises:
        ConfigurationError: the value in the database is not a valid id.
    """
    return check_run_id(f"trial-{first_number(trial):04d}-{trial.user_attrs['token']}")


def is_default(trial: FrozenTrial) -> bool:
    """Whether the trial uses the default settings, those of the base config."""
    return "default" in trial.user_attrs


def is_lost(trial: FrozenTrial) -> bool:
    """Whether its process was killed or interrupted before the trial ended. A failed trial has an error."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def current_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The current trial of each run by number: the first that is not lost, else the last.

    Of simultaneous claims of one point only the lowest number counts, whether or not the others are withdrawn yet. So
    the next point is that of one process, and a claim whose process died before withdrawing it is never run.
    """
    latest: dict[int, FrozenTrial] = {}
    points: set[str] = set()
    for trial in trials:
        number, point = first_number(trial), repr(sorted(trial.params.items()))
        if "withdrawn" in trial.user_attrs or (number not in latest and point in points):
            continue
        if number not in latest or is_lost(latest[number]):
            latest[number] = trial
            points.add(point)
    return [latest[number] for number in sorted(latest)]


def is_valid_claim(claim: FrozenTrial, trials: Sequence[FrozenTrial], wanted: int) -> bool:
    """Whether `claim` may run: of simultaneous claims of one slot, point or run, the lowest number wins.

    `trials` are all of the study, read after the claim was made; `wanted` is their total number.
    """
    before = current_trials([trial for trial in trials if trial.number < claim.number])
    if "continues" in claim.user_attrs:
        return all(is_lost(trial) for trial in before if first_number(trial) == first_number(claim))
    return len(before) < wanted and all(trial.params != claim.params for trial in before)
