"""A hand-written loop is captured correctly, with closures, scalers and losses in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import slow_but

from training_lens.config.lens_section import LensSection
from training_lens.config.schema import TrainingConfig
from training_lens.core.capture import RunFacts
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import LensStore
from training_lens.errors import LensError
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import load_model

STEPS, SKIPPED = 4, 1  # the step, from 0, whose update a scaler leaves out
Lens = TrainingLensFramework


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = TrainingConfig()
    model = attach(load_model(config.model, torch.device("cpu"), "fp32"), config.peft)
    with torch.no_grad():  # so that A has gradients from the first step
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.train()


@pytest.fixture
def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=3e-3)


def ids(step: int) -> torch.Tensor:
    return torch.arange(2 * 12).reshape(2, 12) + 40 + step


def backward(model: Any, step: int, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    model.zero_grad()
    loss: torch.Tensor = model(input_ids=ids(step), labels=ids(step)).loss
    (loss * scale).backward()
    return loss.detach()


def plain_loop(model: Any, optimizer: Any, lens: Lens) -> list[float]:
    losses = []
    for step in range(STEPS):
        losses.append(backward(model, step))
        optimizer.step()
        lens.step(losses[-1])
    return [float(loss) for loss in losses]


def test_closure_gradients_are_captured_before_the_update(model: Any, optimizer: Any, tmp_path: Path) -> None:
    lens = Lens(tmp_path / "lens")
    norms = []

    def closure() -> torch.Tensor:
        loss = backward(model, len(norms))
        norms.append(torch.stack([p.grad.norm() for n, p in trainable_parameters(model) if "lora_B" in n]).norm())
        return loss

    with lens.watch(model, optimizer):
        for _ in range(STEPS):
            lens.step(optimizer.step(closure))
    captured = LensStore(tmp_path / "lens").series("adapter_gradients", "norm_b").values
    np.testing.assert_allclose(np.linalg.norm(captured, axis=1), torch.stack(norms), rtol=1e-5)
    assert LensStore(tmp_path / "lens").series("adapter_gradients", "self_check").values.max() <= 1e-5


@pytest.mark.parametrize("first", slow_but(["loss"], ["loss", "update"]))
def test_a_step_that_the_scaler_skips_does_not_shift_losses(
    model: Any, optimizer: Any, tmp_path: Path, first: str
) -> None:
    lens, scaler = Lens(tmp_path / "lens"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    with lens.watch(model, optimizer, scaler=scaler):
        for step in range(STEPS):
            overflow = float("inf") if step == SKIPPED else 1.0
            losses.append(backward(model, step, scaler.scale(torch.tensor(overflow))))
            if first == "loss":
                lens.step(losses[-1])
            scaler.step(optimizer)
            scaler.update()
            if first == "update":
                lens.step(losses[-1])
    store = LensStore(tmp_path / "lens")
    del losses[SKIPPED]
    found = store.series("loss", "loss")
    assert found.steps.tolist() == list(range(1, STEPS))
    np.testing.assert_allclose(found.values[:, 0], [float(loss) for loss in losses], rtol=1e-6)
    assert store.series("adapter_gradients", "self_check").values.max() <= 1e-5


def test_a_loss_for_each_micro_batch_is_warned_about(
    model: Any, optimizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lens = Lens(tmp_path / "lens")
    with lens.watch(model, optimizer):
        for step in range(2):
            for _ in range(3):
                lens.step(backward(model, step))
            optimizer.step()
    assert "left out 4 losses" in caplog.text
    assert LensStore(tmp_path / "lens").series("loss", "loss").steps.tolist() == [1, 2]


@pytest.mark.slow
def test_without_losses_everything_else_is_captured(model: Any, optimizer: Any, tmp_path: Path) -> None:
    lens = Lens(tmp_path / "lens", LensSection(probe_every=2), probe={"input_ids": ids(0)})
    with lens.watch(model, optimizer):
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
    store = LensStore(str(tmp_path / "lens"))
    assert store.series("divergence", "kl").steps.tolist() == [0, 2, 4]
    assert "loss" not in store.tables()


@pytest.mark.slow
def test_weights_changed_between_steps_belong_to_the_next_gradients(model: Any, optimizer: Any, tmp_path: Path) -> None:
    lens = Lens(tmp_path / "lens")
    with lens.watch(model, optimizer):
        for step in range(STEPS):
            lens.step(backward(model, step))
            optimizer.step()
            with torch.no_grad():
                for _, parameter in trainable_parameters(model):
                    parameter.mul_(0.5)
    assert LensStore(tmp_path / "lens").series("adapter_gradients", "self_check").values.max() <= 1e-5


def test_an_optimizer_without_adapter_parameters_is_refused(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lens = Lens(tmp_path / "lens")
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(LensError, match="none of the adapter's 70 trained parameters"), lens.watch(model, other):
        raise AssertionError("the block must not be entered")
    with lens.watch(model, torch.optim.AdamW([p for n, p in trainable_parameters(model) if "lora_B" in n])) as context:
        plain_loop(model, context._capture.context.optimizer, lens)
    assert "35 of the adapter's 70 trained parameters are not in the AdamW" in caplog.text
    rms = LensStore(tmp_path / "lens")
    assert np.isnan(rms.series("optimizer_state", "update_rms_a").values).all()
    assert np.isfinite(rms.series("optimizer_state", "update_rms_b").values).all()


def test_an_optimizer_that_never_steps_is_an_error(model: Any, optimizer: Any, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="never stepped"), Lens(tmp_path).watch(model, optimizer):
        pass
    facts = RunFacts(after_step=4)
    with pytest.raises(LensError, match="never stepped"), Lens(tmp_path).watch(model, optimizer, facts=facts):
        pass


def test_an_exception_in_the_block_keeps_captures_and_removes_hooks(model: Any, optimizer: Any, tmp_path: Path) -> None:
    lens = Lens(tmp_path / "lens")
    with pytest.raises(KeyError), lens.watch(model, optimizer):
        plain_loop(model, optimizer, lens)
        raise KeyError("the loop's own")
    backward(model, 0)
    optimizer.step()
    assert LensStore(tmp_path / "lens").series("adapter_gradients", "norm_b").steps.tolist() == [1, 2, 3, 4]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.slow
def test_a_second_run_in_a_folder_replaces_the_first_with_a_warning(
    model: Any, optimizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lens = Lens(tmp_path / "lens")
    for after, steps in ((0, [1, 2, 3, 4]), (4, [1, 2, 3, 4, 5, 6, 7, 8])):
        with lens.watch(model, optimizer, facts=RunFacts(after_step=after)):
            plain_loop(model, optimizer, lens)
        assert LensStore(tmp_path / "lens").series("loss", "loss").steps.tolist() == steps
    assert "are replaced" not in caplog.text
    with lens.watch(model, optimizer):
        plain_loop(model, optimizer, lens)
    assert LensStore(tmp_path / "lens").series("loss", "loss").steps.tolist() == [1, 2, 3, 4]
    assert "are replaced" in caplog.text


@pytest.mark.slow
def test_a_failing_batch_ends_the_capture_and_not_the_run(
    model: Any, optimizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lens = Lens(tmp_path / "lens")
    with lens.watch(model, optimizer):
        plain_loop(model, optimizer, lens)
        lens._capture.context.modules[0].a.data = torch.zeros(2, 2)  # of another shape than its group has
        lens.capture_gradients(STEPS + 1)
        lens.record_step(STEPS + 1, {"loss": 1.0})
    assert caplog.text.count("the lens stops capturing") == 1
    assert LensStore(tmp_path / "lens").series("loss", "loss").steps.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", slow_but([False], [True, False]))
def test_probe_tokens_are_saved_only_with_keep_probe(
    model: Any, optimizer: Any, tmp_path: Path, keep: bool, loaded: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    folder = tmp_path / "lens"
    labels = ids(0).masked_fill(ids(0) < 45, -100)
    for keep_now in (True, keep):  # what an earlier run kept goes, too
        lens = Lens(folder, LensSection(keep_probe=keep_now), probe={"input_ids": ids(0), "labels": labels})
        with lens.watch(model, optimizer):
            plain_loop(model, optimizer, lens)
    assert (folder / "probe.safetensors").is_file() is keep
    if keep:
        kept = loaded(folder / "probe.safetensors")
        assert torch.equal(kept["input_ids"], ids(0))
        assert torch.equal(kept["loss_mask"], labels != -100)


@pytest.fixture
def loaded() -> Callable[[Path], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return load_file
