"""Reading a study's trials: which are the same run gone on with, which were left by a dead process, which count.

Optuna's trials never go back from an end, so a run that is gone on with is a further trial that names the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from training_lens.errors import ConfigurationError
from training_lens.utils.file_schemas import find_type_error
from training_lens.utils.names import check_run_id

BLOCKS = "block_nll"  # of a trial: its losses, summed over blocks of validation rows
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def check_attributes(trial: FrozenTrial) -> None:
    """Refuse what no sweep notes with a trial: the study's database is data, and others may have written it.

    Raises:
        ConfigurationError: names the trial and the attribute.
    """
    numbers = [*(trial.values or ()), *trial.intermediate_values.values(), trial.number]
    misfit = find_type_error("study.db", trial.user_attrs)
    if not misfit and "token" not in trial.user_attrs:
        misfit = "token: it is missing"
    elif not all(isinstance(number, int | float) for number in numbers):
        misfit = f"{numbers}: these are no losses"
    elif trial.state == TrialState.COMPLETE and not trial.values:
        misfit = "value: a finished trial has none"
    if misfit:
        raise ConfigurationError(
            f"sweep.name: trial {trial.number} of the study has a wrong attribute. {misfit}. Restore its database, or "
            "give another sweep.name."
        )
    run_id(trial)


def first_number(trial: FrozenTrial) -> int:
    """The number by which people know the trial: that of the trial whose run it goes on with, or its own."""
    return int(trial.user_attrs.get("continues", trial.number))


def run_id(trial: FrozenTrial) -> str:
    """The id of the trial's run: 'trial-0003-5f3a'. The tail keeps studies of one name apart.

    Raises:
        ConfigurationError: what the study's database has cannot be an id.
    """
    return check_run_id(f"trial-{first_number(trial):04d}-{trial.user_attrs['token']}")


def is_default(trial: FrozenTrial) -> bool:
    """Whether it is the trial of the default settings: those of the base config, which nothing was drawn for."""
    return "default" in trial.user_attrs


def is_lost(trial: FrozenTrial) -> bool:
    """Whether its process ended before the trial did: killed or interrupted. A failed trial has its error noted."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def count_deaths(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """How often a process died at the trial's run; one that was asked to stop did not.

    Args:
        trials: all of the study.
    """
    same = [other for other in trials if first_number(other) == first_number(trial)]
    return sum(is_lost(other) and "released" not in other.user_attrs for other in same)


def current_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """For every run its one trial that counts, in the order of their numbers: the last, or the first not lost."""
    latest: dict[int, FrozenTrial] = {}
    for trial in trials:
        number = first_number(trial)
        if "withdrawn" not in trial.user_attrs and (number not in latest or is_lost(latest[number])):
            latest[number] = trial
    return [latest[number] for number in sorted(latest)]


def is_valid_claim(claim: FrozenTrial, trials: Sequence[FrozenTrial], wanted: int) -> bool:
    """Whether `claim` may run: of processes that claim one place, one point or one run at once, the lowest number does.

    Args:
        trials: all of the study, read after the claim was made.
        wanted: trials in all.
    """
    before = current_trials([trial for trial in trials if trial.number < claim.number])
    if "continues" in claim.user_attrs:
        return all(is_lost(trial) for trial in before if first_number(trial) == first_number(claim))
    return len(before) < wanted and all(trial.params != claim.params for trial in before)
