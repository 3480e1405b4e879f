"""The mathematics of a step, and what a run must keep."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but

from training_lens.config.schema import TrainingConfig
from training_lens.errors import TrainingError
from training_lens.models.adapters import trainable_parameters
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.loop.trainer import Trainer
from training_lens.training.run import TrainingWrapper

Config = Callable[..., TrainingConfig]


def assembled(config: TrainingConfig, tmp_path: Path, name: str = "run") -> Trainer:
    wrapper = TrainingWrapper(config)
    return wrapper._build_trainer(RunFolder(tmp_path / name).create(), wrapper.plan())[0]


def gradients_of_first_step(config: TrainingConfig, tmp_path: Path, name: str) -> tuple[float, list[torch.Tensor]]:
    trainer = assembled(config, tmp_path, name)
    torch.manual_seed(1)
    for parameter in trainer.parameters:  # B is zero at the start and would hide A's gradient
        torch.nn.init.normal_(parameter, std=0.02)
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_gradients(self, trainer: Any, step: int) -> None:
            seen.extend(p.grad.clone() for p in trainer.parameters)

    trainer.callbacks = (Watch(),)
    report = trainer.train_step(next(trainer.schedule.iterate_steps()))
    return report.loss, seen


def test_loss_and_gradient_do_not_depend_on_the_cut(small_config: Config, tmp_path: Path) -> None:
    whole = small_config(training={"batch_size": 16, "micro_batch_tokens": 10**6})
    loss, wanted = gradients_of_first_step(whole, tmp_path, "whole")
    scale = max(g.abs().max().item() for g in wanted)
    for name, cut in {
        "single": {"batch_size": 16, "micro_batch_tokens": 1},
        "some": {"batch_size": 16, "micro_batch_tokens": 300},
        "accumulated": {"batch_size": 4, "gradient_accumulation_steps": 4, "micro_batch_tokens": 300},
    }.items():
        other_loss, gradients = gradients_of_first_step(small_config(training=cut), tmp_path, name)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for a, b in zip(gradients, wanted, strict=True):
            assert (a - b).abs().max().item() <= 1e-5 * scale


@pytest.mark.parametrize(
    "section", [{"lora_dropout": 0.2}, pytest.param({"use_dora": True}, marks=pytest.mark.slow)], ids=str
)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(
    section: dict[str, Any], small_config: Config, tmp_path: Path
) -> None:
    results = [
        gradients_of_first_step(small_config(peft=section, training={"gradient_checkpointing": on}), tmp_path, str(on))
        for on in (False, True)
    ]
    (loss, wanted), (other_loss, gradients) = results
    assert other_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.slow
def test_gradient_checkpointing_keeps_less_for_the_backward_pass(small_config: Config, tmp_path: Path) -> None:
    saved: dict[bool, int] = {}
    for on in (False, True):
        trainer = assembled(small_config(training={"gradient_checkpointing": on}), tmp_path, str(on))
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        trainer.model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.model(input_ids=torch.arange(40, 168).view(1, 128)).logits.sum()
        saved[on] = sum(sizes.values())
    assert saved[True] < saved[False] / 2


def test_b_moves_by_the_ratio_under_lora_plus(small_config: Config, tmp_path: Path) -> None:
    moved: dict[float | None, float] = {}
    for ratio in (None, 16.0):
        trainer = assembled(small_config(peft={"lora_plus_ratio": ratio}), tmp_path, str(ratio))
        trainer.train_step(next(trainer.schedule.iterate_steps()))
        moved[ratio] = sum(p.detach().norm().item() for n, p in trainable_parameters(trainer.model) if "lora_B" in n)
    assert moved[16.0] == pytest.approx(16 * moved[None], rel=1e-3)


def test_frozen_weights_are_bit_identical_after_training(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(), tmp_path)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    learned = {n: p.clone() for n, p in trainable_parameters(trainer.model)}
    trainer.fit()
    after = dict(trainer.model.named_parameters())
    assert all("lora_" in n for n in learned) and all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all(not torch.equal(after[n], p) for n, p in learned.items())


@pytest.mark.slow
def test_the_base_is_validated_before_training_and_training_lowers_the_loss(
    small_config: Config, tmp_path: Path
) -> None:
    trainer = assembled(small_config(training={"epochs": 2}), tmp_path)
    state = trainer.fit()
    assert state.base_validation_loss is not None and state.best_loss < state.base_validation_loss
    assert state.best_step in (6, 12) and state.step == 12


def test_gradients_are_offered_before_clipping(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(training={"max_grad_norm": 1e-3}), tmp_path)
    norms: list[float] = []

    class Watch(Callback):
        def on_gradients(self, trainer: Any, step: int) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in trainer.parameters]).norm()))

    trainer.callbacks = (Watch(),)
    report = trainer.train_step(next(trainer.schedule.iterate_steps()))
    assert norms[0] == pytest.approx(report.grad_norm, rel=1e-4) and report.grad_norm > 1e-3


def test_a_step_reports_what_it_trained_on(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(), tmp_path)
    plan = next(trainer.schedule.iterate_steps())
    report = trainer.train_step(plan)
    examples = [trainer.dataset[int(i)] for i in plan.examples]
    assert report.example_ids == tuple(e.id for e in examples)
    assert report.tokens == sum(len(e.input_ids) for e in examples)
    assert report.supervised_tokens == sum(int(e.loss_mask[1:].sum()) for e in examples)


class Steer(Callback):
    """After each step the adapter becomes noise; of the embedded model up to 0.024, more of it is a higher loss."""

    def __init__(self, *scales: float) -> None:
        self.scales, self.losses = scales, list[float]()

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.parameters:
            parameter.data.copy_(self.scales[report.step - 1] * torch.randn(parameter.shape, generator=generator))

    def on_evaluate(self, trainer: Any, step: int, report: Any, base: bool) -> None:
        self.losses += [] if base else [report.loss]


def test_early_stopping_stops_after_its_patience(small_config: Config, tmp_path: Path) -> None:
    training = {"epochs": 5, "eval_steps": 1, "early_stopping_patience": 2}
    config = small_config(model={"id": "embedded"}, training=training)
    trainer, steer = assembled(config, tmp_path), Steer(0.008, 0.02, 0.014, 0.002)
    trainer.callbacks = (steer,)
    state = trainer.fit()
    best, worst, better = steer.losses
    assert best < better < worst
    assert (state.step, state.best_step, state.best_loss) == (3, 1, best)


def test_a_run_that_a_finding_stops_validates_and_saves_its_last_step(small_config: Config, tmp_path: Path) -> None:
    class Stop(Steer):
        def on_step_end(self, trainer: Any, report: StepReport) -> None:
            super().on_step_end(trainer, report)
            if report.step == 2:
                trainer.request_stop("rate_high")

    trainer = assembled(small_config(training={"epochs": 5, "eval_steps": 5}), tmp_path)
    trainer.callbacks = (stop := Stop(0.008, 0.004),)
    state = trainer.fit()
    assert (state.step, state.best_step, [state.best_loss]) == (2, 2, stop.losses)
    assert [p.name for p in trainer.checkpoints.folder.iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_best_and_last_checkpoints_are_kept(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(model={"id": "embedded"}, training={"eval_steps": 1}), tmp_path)
    trainer.callbacks = (steer := Steer(0.012, 0.004, 0.016, 0.02, 0.024, 0.008),)
    trainer.fit()
    assert steer.losses.index(min(steer.losses)) == 1
    kept = sorted(p.name for p in trainer.checkpoints.folder.iterdir())
    assert kept == ["step-00000002", "step-00000006"]


@pytest.mark.parametrize("where", slow_but(["loss"], ["loss", "gradient"]))
def test_a_non_finite_step_stops_before_the_update(small_config: Config, tmp_path: Path, where: str) -> None:
    trainer = assembled(small_config(training={"save_steps": 2, "eval_steps": 2}), tmp_path, "Run")

    class Poison(Callback):
        def on_step_end(self, trainer: Any, report: StepReport) -> None:
            if report.step == 3 and where == "loss":
                trainer.parameters[0].data.fill_(float("nan"))
            self.before = [p.clone() for p in trainer.parameters]

        def on_gradients(self, trainer: Any, step: int) -> None:
            if step == 4 and where == "gradient":
                trainer.parameters[0].grad[0, 0] = float("inf")

    poison = Poison()
    trainer.callbacks = (poison,)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert f"step 4: the {where} is not finite" in message
    assert str(tmp_path / "Run/checkpoints/step-00000002") in message and "train.jsonl:" in message
    for parameter, before in zip(trainer.parameters, poison.before, strict=True):
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(before))


@pytest.mark.slow
def test_a_resumed_early_stop_stays_stopped(small_config: Config, tmp_path: Path) -> None:
    training = {"epochs": 5, "eval_steps": 1, "early_stopping_patience": 1}
    config = small_config(model={"id": "embedded"}, training=training)
    first = assembled(config, tmp_path)
    first.callbacks = (Steer(0.008, 0.02),)
    assert first.fit().step == 2
    wrapper = TrainingWrapper(config)
    again, _ = wrapper._build_trainer(RunFolder(tmp_path / "run"), wrapper.plan())
    assert again.fit(resume=True).step == 2


@pytest.mark.slow
def test_without_save_steps_checkpoints_come_with_the_validations(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(training={"eval_steps": 4}), tmp_path)
    saved: list[str] = []

    class Watch(Callback):
        def on_checkpoint(self, trainer: Any, folder: Path) -> None:
            saved.append(folder.name)

    trainer.callbacks = (Watch(),)
    trainer.fit()
    assert saved == ["step-00000004", "step-00000006"]


def test_a_validation_that_fails_never_ends_the_run(
    small_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(data={"val_ratio": 0.2, "max_examples": 20}, training={"max_steps": 2, "epochs": 1})

    class NoRoomToValidate(Callback):
        """Memory that is enough for steps and not for validation."""

        def on_train_start(self, trainer: Any) -> None:
            def check(decoder: torch.nn.Module, *_inputs: Any) -> None:
                if not decoder.training:
                    raise torch.OutOfMemoryError("no room to validate")

            trainer.model.get_base_model().get_decoder().register_forward_pre_hook(check)

    summary = TrainingWrapper(config, callbacks=(NoRoomToValidate(),)).train()
    assert (summary.status, summary.steps) == ("finished", 2)
    assert summary.validation_loss is None and summary.base_validation_loss is None
    assert (RunFolder(Path(summary.run_dir)).adapter / "adapter_model.safetensors").is_file()
    assert "step 2: no validation: evaluating failed: no room to validate" in caplog.text


def too_large_for(model: Any, tokens: int) -> None:
    """Let a model behave as one of a device that cannot hold so many tokens at once."""

    def refuse(_module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids")
        if ids is not None and ids.numel() > tokens:
            raise torch.OutOfMemoryError(f"Tried to allocate {ids.numel()} GiB.")

    model.get_base_model().get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.slow
def test_a_step_without_enough_memory_is_taken_again_in_smaller_parts(
    small_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(training={"batch_size": 16})
    whole = assembled(config, tmp_path, "whole")
    plan = next(whole.schedule.iterate_steps())
    tokens = int(whole.dataset.lengths[plan.examples].sum())
    wanted = whole.train_step(plan)
    short = assembled(config, tmp_path, "short")
    too_large_for(short.model, tokens // 3)
    with caplog.at_level("WARNING"):
        found = short.train_step(plan)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
    assert short.state.micro_batch_tokens == short.micro_batch_tokens <= tokens // 3
    said = [r.message.split(":")[0] for r in caplog.records if "memory" in r.message]
    assert said[0] == f"out of memory with micro-batches of {tokens} tokens; now {tokens // 2}" and len(said) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU nothing waits for a device")
def test_no_micro_batch_waits_for_the_device(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(model={"device": "cuda"}), tmp_path)
    first, second = islice(trainer.schedule.iterate_steps(), 2)
    trainer.train_step(first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = trainer._accumulate_gradients(second, targets=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(sums[0]) > 0


@pytest.mark.slow
def test_one_example_that_does_not_fit_ends_the_run(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(training={"batch_size": 4}), tmp_path, "none")
    too_large_for(trainer.model, 1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step(next(trainer.schedule.iterate_steps()))


@pytest.mark.slow
def test_what_memory_was_found_to_hold_outlives_a_resume(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(training={"batch_size": 16}), tmp_path)
    found = replace(trainer.state, step=1, micro_batch_tokens=123)
    trainer.checkpoints.save(trainer.model, trainer.optimizer, trainer.scaler, found)
    trainer.state = trainer.checkpoints.restore(trainer.model, trainer.optimizer, trainer.scaler)
    assert trainer.micro_batch_tokens == 123


@pytest.mark.slow
def test_a_resume_deletes_the_checkpoint_that_a_kill_left_over(small_config: Config, tmp_path: Path) -> None:
    trainer = assembled(small_config(training={"batch_size": 16}), tmp_path)
    for state in (replace(trainer.state, step=1, best_step=1, best_loss=2.0), replace(trainer.state, step=2)):
        newest = trainer.checkpoints.save(trainer.model, trainer.optimizer, trainer.scaler, state)
    shutil.copytree(newest, newest.with_name("step-00000001"))  # as if killed before it was deleted
    trainer.fit(resume=True)
    assert "step-00000001" not in [path.name for path in newest.parent.iterdir()]
