"""What a sweep leaves behind: best.yaml is read back as it was, importances only where losses differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import create_trial

from training_lens.config.compose import compose, validate
from training_lens.config.schema import TrainingConfig
from training_lens.sweeps.leaderboard import Leaderboard, Row, importances
from training_lens.sweeps.report import best_yaml
from training_lens.sweeps.space import Space

BEST = Row(0, "finished", 1.0, {"peft.r": 4}, 1.0, "trial-0000-abcd", None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"revision": "1e5"}},
        {"model": {"revision": "12e45"}},
        {"model": {"revision": "no"}},
        {"data": {"train": ["a/${b}/c.jsonl", r"d\${e}.jsonl", "f\\\\${g}.jsonl"]}},
        {"peft": {"target_modules": r".*layers\.[0-3]\..*_proj$"}},
        {"training": {"max_grad_norm": None, "lr": 1e-05}},
        {"sweep": {"name": "a\nmodel: {id: evil}"}},
    ],
)
def test_the_best_config_is_read_back_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    sweep = {"space": {"peft.r": [2, 4]}, **values.get("sweep", {})}
    data = {"train": "x.jsonl", "validation": "y.jsonl", **values.get("data", {})}
    config = validate({**values, "data": data, "sweep": sweep})
    file = tmp_path / "best.yaml"
    file.write_text(best_yaml(Leaderboard(config.sweep.name, "validation_loss", (BEST,), {}), BEST, config))
    wanted = config.resolved(peft={"r": 4}, sweep={"space": {}, "name": "sweep"})
    assert compose(str(file)).model_dump() == wanted.model_dump()


def test_there_are_no_importances_where_all_losses_are_equal(sweep_config: Callable[..., TrainingConfig]) -> None:
    space = Space.of(sweep_config(space={"peft.r": [2, 4, 8, 16]}))

    def trials(losses: list[float]) -> list[Any]:
        points = zip(space.points(), losses, strict=True)
        return [create_trial(params=p, distributions=space.distributions(), value=loss) for p, loss in points]

    assert importances(trials([1.0] * 4)) == {}
    assert importances(trials([1.0, 2.0, 3.0, 4.0])) == {"peft.r": 1.0}
