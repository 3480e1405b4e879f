"""The budget of a micro-batch: what memory holds, the same again on one machine, kept by a run, without a trace."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise  # type: ignore[import-not-found]
from slow_cases import slow_but
from tiny_models import tiny_model

from training_lens.config.schema import ModelSection, PeftSection, TrainingConfig
from training_lens.errors import InterruptedRunError
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import checkpoint_gradients
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import uninstall_kernels
from training_lens.runs.run_folder import RunFolder
from training_lens.training.estimate import estimate_run
from training_lens.training.loop import memory_budget as budget
from training_lens.training.loop.callbacks import Callback
from training_lens.training.loop.memory_budget import (
    BUFFER_BYTES,
    LEAST_TOKENS,
    Footprint,
    affordable_tokens,
    estimate_footprint,
    measure_token_budget,
    plan_token_budget,
)
from training_lens.training.loop.trainer import Trainer
from training_lens.training.run import TrainingWrapper
from training_lens.utils.devices import autocast

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTH = 64
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, int]] = {
    "Llama": SIZES,
    "Qwen3": {**SIZES, "head_dim": 64},
    "GPT2": {"n_embd": 256, "n_layer": 3, "n_positions": 1024},
}
Config = Callable[..., TrainingConfig]


def kept_bytes(model: Any, precision: Any, fused: bool) -> int:
    """What autograd keeps for the backward pass of two examples, apart from the model's own parameters."""
    engine, own, sizes = Engine(model), {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    if not fused:
        uninstall_kernels(model)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes(), tensor  # held: or another takes its place in memory
        return tensor

    ids = torch.arange(2 * LENGTH).view(2, -1) % 97
    in_line = fused and engine.can_pack
    shape, line = ((1, -1), (LENGTH, LENGTH)) if in_line else ((2, -1), ())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(CPU, precision):
        engine.loss_sum(ids.view(shape), torch.ones_like(ids, dtype=torch.bool).view(shape), line)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize(("name", "precision", "fused"), pairwise(list(KINDS), ["fp32", "bf16"], [True, False]))
def test_the_footprint_covers_what_autograd_keeps_and_not_many_times_that(
    name: str, precision: Any, fused: bool
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = tiny_model(name, dtype, **KINDS[name])
    config = TrainingConfig(model=ModelSection(seq_len=LENGTH), peft=PeftSection(r=4, lora_dropout=0.1))
    model = attach(model, config.peft).train()
    expected = estimate_footprint(model.get_base_model(), config, precision).token * 2 * LENGTH
    kept = kept_bytes(model, precision, fused)
    assert kept <= expected <= 3.5 * kept, f"{expected / kept:.2f} times what is kept"


def test_the_footprint_has_weights_adapter_and_what_lowers_them(small_config: Config) -> None:
    plain = TrainingConfig(model=ModelSection(seq_len=LENGTH))
    base = tiny_model(**SIZES)
    frozen = sum(p.numel() for p in base.parameters())
    model = attach(base, plain.peft).get_base_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate_footprint(model, plain, "fp32").fixed == 4 * frozen + 16 * trained + BUFFER_BYTES
    assert estimate_footprint(model, plain, "bf16").fixed == 2 * frozen + 16 * trained + BUFFER_BYTES
    packed = plain.replace_keys(model={"quantization": "4bit"})
    assert estimate_footprint(model, packed, "bf16").fixed < frozen + 16 * trained + BUFFER_BYTES
    less = plain.replace_keys(training={"gradient_checkpointing": True})
    assert estimate_footprint(model, less, "fp32").token < estimate_footprint(model, plain, "fp32").token / 2


def test_gradient_checkpointing_keeps_what_the_footprint_says() -> None:
    config = TrainingConfig(model=ModelSection(seq_len=LENGTH), training={"gradient_checkpointing": True})
    model = attach(tiny_model(**SIZES), config.peft)
    expected = estimate_footprint(model.get_base_model(), config, "fp32").token
    checkpoint_gradients(model)
    inputs = 4 * SIZES["num_hidden_layers"] * SIZES["hidden_size"]
    assert kept_bytes(model.train(), "fp32", fused=True) / (2 * LENGTH) + inputs <= expected


@pytest.mark.parametrize(
    ("free", "device", "tokens"),
    [
        (None, CPU, 4096),  # the system does not say
        (None, CUDA, 4096),
        (10**12, CPU, 4096),
        (10**12, CUDA, 32768),
        (1_000_000 + 1_600_000, CPU, 1024),  # 0.8 of it are 2.08 MB: 1,080 tokens of 1,000 bytes beside 1 MB
        (3_000_000 + 10_000_000, CUDA, 8192),
        (1_000_000, CPU, LEAST_TOKENS),
        (0, CUDA, LEAST_TOKENS),
    ],
)
def test_as_many_tokens_as_fit_in_powers_of_two(free: int | None, device: torch.device, tokens: int) -> None:
    assert affordable_tokens(free, Footprint(fixed=1_000_000, token=1000), device) == tokens


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda _device: 4_000_000)
    needs = Footprint(fixed=0, token=1000)
    assert [plan_token_budget(needs, CPU, processes) for processes in (1, 2, 4)] == [2048, 1024, 512]
    assert plan_token_budget(needs, CUDA, 4) == 2048


@pytest.mark.slow
def test_a_run_records_its_budget_and_an_explicit_number_is_taken_as_it_is(
    small_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for asked, expected in (({}, 4096), ({"micro_batch_tokens": 333}, 333)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "training_lens"):
            summary = TrainingWrapper(small_config(training={"max_steps": 1, **asked})).train()
        run = RunFolder(Path(summary.run_dir))
        state = json.loads((run.checkpoints / "step-00000001/state.json").read_text())
        assert summary.micro_batch_tokens == state["micro_batch_tokens"] == expected
        assert [r.message for r in caplog.records].count(f"micro-batches of at most {expected} tokens") == 1


@pytest.mark.slow
def test_a_resumed_run_keeps_its_budget_whatever_is_free_then(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leave(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    config = small_config(training={"max_steps": 2}, output={"run_id": "cut"})
    with pytest.raises(InterruptedRunError):
        TrainingWrapper(config, callbacks=(Leave(),)).train()
    monkeypatch.setattr(budget, "available_bytes", lambda _device: 0)
    assert TrainingWrapper(small_config()).plan().micro_batch_tokens == LEAST_TOKENS
    run = RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/cut")
    assert TrainingWrapper.resume(run).micro_batch_tokens == 4096


def adapter_after(config: TrainingConfig, folder: Path, before: Callable[[Trainer], Any]) -> dict[str, torch.Tensor]:
    """The adapter's numbers after the run's steps, with something done before them."""
    wrapper = TrainingWrapper(config)
    trainer = wrapper._build_trainer(RunFolder(folder).create(), wrapper.plan())[0]
    before(trainer)
    trainer.fit()
    return {name: p.detach().clone() for name, p in trainable_parameters(trainer.model)}


@pytest.mark.parametrize("bits", slow_but(["none"], ["none", "4bit"]))
def test_a_rehearsal_changes_no_bit_of_the_run(bits: str, small_config: Config, tmp_path: Path) -> None:
    """Nor where the base keeps state from its first pass, as bitsandbytes' layers do."""
    if bits != "none":
        pytest.importorskip("bitsandbytes")
    quantized = {"quantization": bits, "device": "cpu"}
    config = small_config(model=quantized, peft={"lora_dropout": 0.2}, training={"max_steps": 2})
    tokens: list[int] = []
    alone = adapter_after(config, tmp_path / "alone", lambda trainer: None)
    rehearsed = adapter_after(
        config, tmp_path / "rehearsed", lambda trainer: tokens.append(trainer.run_longest_batch())
    )
    assert tokens[0] > 256 and alone.keys() == rehearsed.keys()
    assert all(torch.equal(alone[name], rehearsed[name]) for name in alone)


@pytest.mark.slow
def test_a_measured_pass_gives_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a device that is not here, as torch would give them: 2 MB for a pass of 1,000 tokens."""
    held = {"memory_allocated": 5_000_000, "max_memory_allocated": 7_000_000, "mem_get_info": (22_000_000, 0)}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_device: None)
    # (0.8 x 22 MB - 1.6 MB) / 2 kB = 8,000
    assert measure_token_budget(CUDA, lambda _tokens: 1000, trainable=100_000) == 4096
    asked = []

    def run_small_pass(tokens: int, most: int) -> int:
        asked.append(tokens)
        if tokens > most:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")
        return tokens

    assert measure_token_budget(CUDA, lambda tokens: run_small_pass(tokens, 600), trainable=0) == 4096
    assert asked == [2048, 1024, 512]
    assert measure_token_budget(CUDA, lambda tokens: run_small_pass(tokens, 0), trainable=0) == LEAST_TOKENS
    with pytest.raises(KeyError):
        measure_token_budget(CUDA, lambda _tokens: {}["wrong"], trainable=0)


@pytest.mark.slow
def test_an_estimate_says_the_budget_for_the_memory_that_is_free(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda _device: 0)
    estimate = estimate_run(TrainingWrapper(small_config()).plan())
    assert estimate is not None and estimate.micro_batch_tokens == LEAST_TOKENS
