"""Between config and Optuna: every point of a space becomes a config that the schema takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from training_lens.config.schema import TrainingConfig
from training_lens.errors import ConfigurationError
from training_lens.sweeps.search_strategies import build_study, propose_point
from training_lens.sweeps.space import Space

Config = Callable[..., TrainingConfig]
LR = {"low": 1e-5, "high": 1e-2, "log": True}
MIXED = {
    "training.lr": LR,
    "training.batch_size": {"low": 2, "high": 8, "step": 2},
    "peft.lora_dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
    "peft.target_modules": ["auto", ["q_proj", "v_proj"]],
    "training.max_grad_norm": [None, 0.5],
}


def proposals(config: TrainingConfig, count: int) -> list[dict[str, Any]]:
    """What is proposed one after the other, where every trial ends with a loss at once."""
    space, study = Space.from_config(config), build_study([])
    for number in range(count):
        params = propose_point(space, config.sweep, study.get_trials())
        if params is None:
            break
        study.enqueue_trial(params)
        study.tell(study.ask(space.distributions()), abs(number - 2.5))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_what_is_proposed_is_within_the_space_and_becomes_a_config(sweep_config: Config, sampler: str) -> None:
    base = sweep_config(space=MIXED, sampler=sampler, trials=12)
    space = Space.from_config(base)
    for params in proposals(base, 12):
        config = space.trial_config(base, params, {"run_id": "x"})
        assert 1e-5 <= (config.training.lr or 0) <= 1e-2
        assert config.training.batch_size in (2, 4, 6, 8)
        assert config.peft.lora_dropout in (0.0, 0.1, 0.2, 0.3)
        assert config.peft.target_modules in ("auto", ["q_proj", "v_proj"])
        assert config.training.max_grad_norm in (None, 0.5)
        assert config.training.max_steps == 2 and config.output.run_id == "x"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_are_a_function_of_the_seed_and_the_history(sweep_config: Config, sampler: str) -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        return proposals(sweep_config(space=MIXED, sampler=sampler, seed=seed), 8)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_point_beside_running_trials_is_not_proposed(sweep_config: Config) -> None:
    """Several processes would otherwise try almost the same at once: a running trial counts as a bad one."""
    config = sweep_config(space={"training.lr": LR}, trials=30)
    space = Space.from_config(config)

    def trial(lr: float, loss: float | None = None) -> FrozenTrial:
        state = TrialState.RUNNING if loss is None else TrialState.COMPLETE
        point, distributions = {"training.lr": lr}, space.distributions()
        return create_trial(state=state, params=point, distributions=distributions, value=loss)

    finished = [trial(1e-5 * 1000 ** (i / 11), (i - 5) ** 2 / 10) for i in range(12)]

    def propose_beside(center: float) -> float:
        running = [trial(space.round_point({"training.lr": center * (1 + i / 1000)})["training.lr"]) for i in (1, 2, 3)]
        point = propose_point(space, config.sweep, [*finished, *running])
        assert point is not None
        return float(point["training.lr"])

    alone = propose_beside(9e-3)
    assert abs(math.log(propose_beside(alone) / alone)) > 0.05


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_finite_space_is_tried_whole_without_a_repeat(sweep_config: Config, sampler: str) -> None:
    space = {"peft.r": [2, 4, 8], "peft.lora_dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}
    config = sweep_config(space=space, sampler=sampler)
    tried = proposals(config, 20)
    every = [{"peft.r": r, "peft.lora_dropout": d} for r in (2, 4, 8) for d in (0.0, 0.1, 0.2, 0.3)]
    assert (
        sorted(map(str, tried)) == sorted(map(str, every)) == sorted(map(str, Space.from_config(config).list_points()))
    )
    assert tried != every  # drawn with the seed, so that a part of a grid is spread over it


def test_a_grid_needs_an_end(sweep_config: Config) -> None:
    with pytest.raises(ConfigurationError, match=r"sweep\.space\.training\.lr: a grid of a continuous range"):
        Space.from_config(sweep_config(space={"training.lr": LR, "peft.r": [4]}, sampler="grid"))
    with pytest.raises(ConfigurationError, match="over 10,000 points"):
        Space.from_config(sweep_config(space={"training.seed": {"low": 0, "high": 10_000}}, sampler="grid"))


def test_without_a_space_there_is_nothing_to_search(sweep_config: Config) -> None:
    with pytest.raises(ConfigurationError, match="nothing to search"):
        Space.from_config(sweep_config(space={}))


def test_the_first_point_is_one_that_becomes_a_config(sweep_config: Config) -> None:
    cycles, schedulers = [3, 1], ["cosine", "cosine_with_restarts"]
    base = sweep_config(space={"training.scheduler_cycles": cycles, "training.scheduler": schedulers})
    first = Space.from_config(base).first_valid_point(base)
    assert first == {"training.scheduler_cycles": 3, "training.scheduler": "cosine_with_restarts"}
    base = sweep_config(space={"training.scheduler_cycles": [3, 2], "training.lr": LR})
    with pytest.raises(ConfigurationError, match=r"with training.scheduler_cycles=3, training.lr=1e-05: .* 3 cycles"):
        Space.from_config(base).first_valid_point(base)


def test_values_that_do_not_go_together_are_named(sweep_config: Config) -> None:
    base = sweep_config(space={"training.scheduler_cycles": [1, 3]})
    with pytest.raises(ConfigurationError, match="3 cycles need scheduler=cosine_with_restarts"):
        Space.from_config(base).trial_config(base, {"training.scheduler_cycles": 3})
