"""The study that the processes of a sweep share: open it, claim trials, and record how they end."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from training_lens.config.schema import TrainingConfig
from training_lens.config.search_space import flatten_keys
from training_lens.errors import ConfigurationError
from training_lens.sweeps.search_strategies import build_pruner, propose_point
from training_lens.sweeps.space import Params, Space
from training_lens.sweeps.study_storage import explain_lost_storage, open_storage, read_url
from training_lens.sweeps.trials import (
    BLOCKS,
    check_attributes,
    current_trials,
    first_number,
    is_default,
    is_lost,
    is_valid_claim,
)
from training_lens.sweeps.worker import Worker, delete_lock, is_alive, send_heartbeats
from training_lens.training.resume import FREE_KEYS
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.nested import find_differences, flatten_sections, nest_keys

logger = get_logger(__name__)
HEARTBEATS = 10  # in the time after which a trial without one is taken over
CARRIED = ("token", "default", BLOCKS)  # copied from a lost trial to the one that resumes its run
# Raised by Optuna on rows that it did not write.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, StopIteration)


class SharedStudy:
    """One process's view of the study.

    Args:
        folder: the sweep's folder; it holds study.db unless a storage is given.
        rows: a fingerprint of the data files by config key.
        default: the base config's values for the keys of the space, used by the first trial; None: sampled, too.

    Raises:
        ConfigurationError: the storage cannot be opened, or has a study of this name with another config, other rows
            or another space, or one that is not a sweep.
    """

    def __init__(
        self,
        config: TrainingConfig,
        space: Space,
        folder: Path,
        rows: Mapping[str, str],
        default: Mapping[str, Any] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.settings, self.space = config.sweep, space
        self._url = read_url(config.sweep.storage, folder)
        with (
            open_storage(self._url, config.sweep.takeover_seconds) as self._storage,
            _explain_study(config.sweep.name),
        ):
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=config.sweep.name,
                pruner=build_pruner(config.sweep),
                direction="minimize",
                load_if_exists=True,
            )
            self._study_id = self._storage.get_study_id_from_name(config.sweep.name)
            is_begun = bool(self._study.get_trials(deepcopy=False))  # first: who has trials has noted its config before
            noted = "config" in self._study.user_attrs or not is_begun
            if self._study.directions != [StudyDirection.MINIMIZE] or not noted:
                raise ConfigurationError(
                    f"sweep.name: the storage has a study '{config.sweep.name}' that is not a sweep of Training Lens. "
                    "Give another sweep.name, or another sweep.storage."
                )
            if default is not None and "config" not in self._study.user_attrs:  # an older study sampled its first trial
                self._study.set_user_attr("default", dict(default))
            self._require_same(_shared_values(config) | {f"the rows of {key}": found for key, found in rows.items()})

    def _require_same(self, mine: dict[str, Any]) -> None:
        """Check config, rows and space against the study; the first process stores them in it."""
        if "config" not in self._study.user_attrs:
            self._study.set_user_attr("config", mine)
        theirs, mine = _flatten_config(self._study.user_attrs["config"]), _flatten_config(mine)
        found = sorted(find_differences([theirs, mine]).items())
        problems = [f"{key}: the study '{self.settings.name}' has {a!r}, given {b!r}" for key, (a, b) in found]
        if problems:
            advice = "trials of different studies cannot be compared; give another sweep.name, or the same values"
            raise ConfigurationError([*problems, advice])

    def current_trials(self) -> list[FrozenTrial]:
        """The current trial of each run, by number."""
        return current_trials(self._read_all_trials())

    def _read_all_trials(self, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        """All trials in the given states, with checked attributes."""
        with _explain_study(self.settings.name):
            trials = self._study.get_trials(deepcopy=False, states=states)
            for trial in trials:
                check_attributes(trial)
                self.space.config_values(trial.params)
                for key, value in trial.params.items():
                    trial.distributions[key].to_internal_repr(value)
        return trials

    def read_trial(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial as it is now in the storage."""
        return self._storage.get_trial(self._trial_id(trial))

    def claim_trial(self, worker: Worker) -> FrozenTrial | None:
        """The next trial for this process: a lost one or a new one; None if there is none."""
        while True:
            self._release_dead()
            trials = self.current_trials()
            left = next((trial for trial in trials if is_lost(trial)), None)
            if sum(not is_lost(trial) for trial in trials) >= self.settings.trials:
                return None
            params, noted = (left.params, {}) if left is not None else self._choose_params(trials)
            if params is None:
                return None
            claim = self._create_trial(params, worker, left, noted)
            if is_valid_claim(claim, self._read_all_trials(), self.settings.trials):
                return claim
            self._storage.set_trial_user_attr(self._trial_id(claim), "withdrawn", True)
            self.release_trial(claim)

    def _choose_params(self, trials: list[FrozenTrial]) -> tuple[Params | None, dict[str, Any]]:
        """The next point and the attributes to store with it: the default settings first, then sampled ones."""
        default = self._study.user_attrs.get("default")
        if default is not None and not any(is_default(trial) for trial in trials):
            return self.space.find_point(default) or {}, {"default": default}
        return propose_point(self.space, self.settings, trials), {}

    def _create_trial(
        self, params: Params, worker: Worker, left: FrozenTrial | None = None, noted: Mapping[str, Any] | None = None
    ) -> FrozenTrial:
        """Write a running trial in one transaction, so that no other process sees a part of it."""
        attributes: dict[str, Any] = {**worker.trial_attributes, "token": secrets.token_hex(2), **(noted or {})}
        if left is not None:
            attributes |= {name: left.user_attrs[name] for name in CARRIED if name in left.user_attrs}
            attributes["continues"] = first_number(left)
        distributions = self.space.distributions()
        template = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={key: distributions[key] for key in params},
            user_attrs=attributes,
            intermediate_values=left.intermediate_values if left is not None else None,
        )
        trial_id = self._storage.create_new_trial(self._study_id, template)
        self._storage.record_heartbeat(trial_id)
        return self._storage.get_trial(trial_id)

    def count_deaths(self, trial: FrozenTrial) -> int:
        """How often a process died during the trial's run, not counting processes that were asked to stop."""
        same = [other for other in self._read_all_trials() if first_number(other) == first_number(trial)]
        return sum(is_lost(other) and "released" not in other.user_attrs for other in same)

    def _release_dead(self) -> None:
        """Mark running trials of dead processes as lost, by their lock, or else by their heartbeat."""
        for trial in self._read_all_trials([TrialState.RUNNING]):
            alive = is_alive(trial.user_attrs)
            if alive:  # including a stopped process or a suspended machine
                self._storage.record_heartbeat(self._trial_id(trial))
            elif alive is False:
                self._end_trial(trial, TrialState.FAIL)
                delete_lock(trial.user_attrs)  # not before: without its lock, a running trial would count as alive
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def send_heartbeats(self, trial: FrozenTrial) -> AbstractContextManager[None]:
        """Inside the context, other machines see that the trial is alive."""
        return send_heartbeats(self._storage, self._trial_id(trial), self.settings.takeover_seconds / HEARTBEATS)

    def report_loss(self, trial: FrozenTrial, validation: int, loss: float) -> bool:
        """Record the loss at a validation, counted from 1; returns whether the pruner would end the trial."""
        self._storage.set_trial_intermediate_value(self._trial_id(trial), validation, loss)
        return self._study.pruner.prune(self._study, self.read_trial(trial))

    def keep_losses(self, trial: FrozenTrial, sums: list[float]) -> None:
        """Record the adapter's losses on blocks of validation rows, for a paired comparison."""
        self._storage.set_trial_user_attr(self._trial_id(trial), BLOCKS, sums)

    def end_trial(self, trial: FrozenTrial, state: TrialState, loss: float | None = None, **facts: Any) -> None:
        """Record how the trial ended, with its `facts`: a failed one needs `error`, and is not tried again."""
        if not self._end_trial(trial, state, loss, facts):  # we slept beyond the grace period
            logger.warning(
                "trial %d was taken over by another process; its end here is not recorded", first_number(trial)
            )

    def release_trial(self, trial: FrozenTrial) -> None:
        """Give back an unfinished trial, for the next process that claims one to resume."""
        self._end_trial(trial, TrialState.FAIL, facts={"released": True})

    def _end_trial(
        self, trial: FrozenTrial, state: TrialState, loss: float | None = None, facts: Mapping[str, Any] | None = None
    ) -> bool:
        """End the trial; returns False if it has ended already."""
        trial_id = self._trial_id(trial)
        try:
            for name, value in (facts or {}).items():
                self._storage.set_trial_user_attr(trial_id, name, value)
            self._storage.set_trial_state_values(trial_id, state, None if loss is None else [loss])
        except UpdateFinishedTrialError:
            return False
        return True

    def explain_lost_database(self) -> AbstractContextManager[None]:
        """Inside the context, a database that no longer answers becomes a TrainingError."""
        return explain_lost_storage(self.settings.name, self._url)

    def close(self) -> None:
        """Close the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()


@contextmanager
def _explain_study(name: str) -> Iterator[None]:
    """Inside the context, an error of Optuna on rows that it did not write becomes a ConfigurationError."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"sweep.name: the database of the study '{name}' is damaged ({describe_error(error)}). Restore it, or give "
            "another sweep.name."
        ) from error


def free_settings(config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """This process's values of `FREE_KEYS`, by section."""
    return nest_keys({key: attrgetter(key)(config) for key in FREE_KEYS})[0]


def _flatten_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections by dotted key; keys that the previous version did not have get their defaults."""
    unset = flatten_sections(_shared_values(TrainingConfig()))
    return {**unset, **flatten_sections({**values, "sweep.space": None}), "sweep.space": values.get("sweep.space")}


def _shared_values(config: TrainingConfig) -> dict[str, Any]:
    """The values that all trials of a study share, by key."""
    values = config.model_dump(mode="json", include={"model", "data", "peft", "training"})
    by_key = {f"{section}.{name}": value for section, keys in values.items() for name, value in keys.items()}
    kept = {key: value for key, value in by_key.items() if key not in FREE_KEYS}
    shared = {f"sweep.{name}": getattr(config.sweep, name) for name in ("metric", "takeover_seconds")}
    return {**kept, **shared, "sweep.space": flatten_keys(config.sweep.space)}
