"""A run that cannot learn stops at its first steps and names the cause; every healthy kind of adapter passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_cases import mark_slow, slow_but
from tiny_models import save_tiny_model

from training_lens import TrainingWrapper
from training_lens.errors import TrainingError
from training_lens.runs.run_folder import RunFolder
from training_lens.training.estimate import estimate_run
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.preflight.first_steps import AdapterParameter, explain_still_modules
from training_lens.utils.integrity import read_sealed

Config = Callable[..., Any]


def train(config: Any, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


class ChangeModel(Callback):
    """Calls `change` with the trainer when training starts."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        self.change = change

    def on_train_start(self, trainer: Any) -> None:
        self.change(trainer)


def freeze(trainer: Any, part: str) -> None:
    for name, parameter in trainer.model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)


def drop_from_optimizer(trainer: Any, part: str) -> None:
    group = trainer.optimizer.param_groups[0]
    kept = [p for n, p in zip(group["param_names"], group["params"], strict=True) if part not in n]
    group["params"] = kept
    group["param_names"] = [n for n in group["param_names"] if part not in n]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        mark_slow(
            (lambda trainer: freeze(trainer, "layers.0.mlp"), "requires_grad is off (all of it): model.layers.0.mlp")
        ),
        (lambda trainer: freeze(trainer, "lora_B"), "requires_grad is off (lora_B"),
        mark_slow(
            (
                lambda trainer: drop_from_optimizer(trainer, "layers.1."),
                "the optimizer does not hold its parameters: model.l",
            )
        ),
    ],
    ids=["a frozen layer", "frozen B", "not in the optimizer"],
)
def test_modules_that_do_not_train_stop_the_run(small_config: Config, change: Any, cause: str) -> None:
    with pytest.raises(TrainingError, match=r"step [12]: .* adapted modules do not train") as caught:
        train(small_config(training={"max_steps": 3, "warmup_steps": 0}), ChangeModel(change))
    assert cause in str(caught.value)


def test_a_switched_off_adapter_stops_the_run(small_config: Config) -> None:
    with pytest.raises(TrainingError, match="the adapter is switched off, or all of it is frozen"):
        train(small_config(training={"max_steps": 3}), ChangeModel(lambda trainer: freeze(trainer, "lora_")))


PASSING: list[dict[str, Any]] = [
    {"peft": {"use_dora": True}},
    {"peft": {"modules_to_save": ["lm_head"]}},
    {"training": {"max_steps": 1}},
    {},
    {"peft": {"init": "pissa"}},
    {"peft": {"variant": "rslora", "lora_plus_ratio": 8.0}},
    {"training": {"max_steps": 2, "warmup_steps": 50, "lr": 1e-7}},
    {"training": {"max_steps": 2, "optimizer": "adafactor"}},
    {"training": {"max_steps": 2, "gradient_checkpointing": True, "precision": "fp32"}},
]


@pytest.mark.parametrize("sections", slow_but(PASSING[:1], PASSING), ids=str)
def test_every_kind_of_adapter_passes(small_config: Config, sections: dict[str, Any]) -> None:
    sections.setdefault("training", {"max_steps": 2})
    run = train(small_config(**sections))
    found = {each["code"]: each["severity"] for each in read_sealed(run.reports / "preflight.json")["findings"]}
    assert found["base_model"] == "note" and found["duplicates"] == "fine"  # the demo's base knows only plain stories


def parameter(name: str, **outcome: bool) -> AdapterParameter:
    fine = {"requires_grad": True, "is_held": True, "is_reached": True, "is_moved": True}
    return AdapterParameter(f"base_model.model.{name}.default.weight", name.split(".lora_")[0], **{**fine, **outcome})


def test_causes_are_told_apart() -> None:
    unused = {"is_reached": False, "is_moved": False}
    causes = explain_still_modules(
        [
            parameter("a.lora_A", is_reached=False),  # as long as B is 0
            parameter("a.lora_B"),
            parameter("unused.lora_A", **unused),
            parameter("unused.lora_B", **unused),
            parameter("experts.3.lora_B", **unused),
            parameter("still.lora_B", is_moved=False),
        ]
    )
    assert set(causes) == {"unused", "still"}
    assert "no gradient reaches it" in causes["unused"] and "updates are 0" in causes["still"]


def broken_base(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    path = save_tiny_model(folder, vocab_size=1024) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def set_one(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize("has_validation", [True, False], ids=["validated", "not validated"])
def test_a_base_with_nan_names_the_weight_and_no_row(
    small_config: Config, tmp_path: Path, has_validation: bool
) -> None:
    data = {} if has_validation else {"train": small_config().data.train}
    with pytest.raises(TrainingError) as caught:
        train(small_config(model={"id": broken_base(tmp_path / "base", set_one)}, data=data))
    message = str(caught.value)
    assert "model.layers.1.mlp.up_proj" in message and "1 values of" in message and "the base is broken" in message


def test_a_base_without_gradients_stops_at_step_1(small_config: Config, tmp_path: Path) -> None:
    base = broken_base(tmp_path / "base", lambda weights: weights["lm_head.weight"].zero_())
    with pytest.raises(TrainingError, match=r"step 1: every gradient is 0.*about ln\(1,024\).*lm_head"):
        train(small_config(model={"id": base}))
    with pytest.raises(TrainingError, match=r"every gradient is 0.*lm_head"):  # validate says so, too
        estimate_run(TrainingWrapper(small_config(model={"id": base})).plan())


def test_a_random_base_is_no_language_model(small_config: Config, tmp_path: Path) -> None:
    base = str(save_tiny_model(tmp_path / "base", vocab_size=1024))
    run = train(small_config(model={"id": base}, training={"max_steps": 2}))
    found = {each["code"]: each for each in read_sealed(run.reports / "preflight.json")["findings"]}
    assert found["base_model"]["severity"] == "warning" and "ln(" in found["base_model"]["measured"]


@pytest.mark.slow
def test_checking_changes_no_bit_of_the_training(small_config: Config) -> None:
    class KeepLosses(Callback):
        def __init__(self) -> None:
            self.losses: list[tuple[float, float]] = []

        def on_train_start(self, trainer: Any) -> None:
            if self.drop:
                trainer.callbacks = tuple(c for c in trainer.callbacks if type(c).__name__ != "FirstStepsCheck")

        drop = False

        def on_step_end(self, trainer: Any, report: StepReport) -> None:
            self.losses.append((report.loss, report.grad_norm))

    checked, unchecked = KeepLosses(), KeepLosses()
    unchecked.drop = True
    for keep in (checked, unchecked):
        train(small_config(training={"max_steps": 4}), keep)
    assert checked.losses == unchecked.losses and len(checked.losses) == 4
