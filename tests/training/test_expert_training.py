"""A mixture's experts train as PEFT trains them, each that tokens were routed to; one that does not stops the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import slow_but
from tiny_models import save_tiny_model

from training_lens import TrainingWrapper
from training_lens.analysis.adapter_analyzers import LoRAParameterAnalyzer
from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.analyzers import RouterLoadAnalyzer
from training_lens.core.lens_store import LensStore
from training_lens.data.batching import epoch_order
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import TrainingError
from training_lens.models.adapters import attach
from training_lens.models.factory import load_model, load_tokenizer
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.devices import seed_everything

Config = Callable[..., Any]
STEPS, ROWS = 20, 64
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "Mixtral": {},
    "LongcatFlash": {},
}
SIZES = {"vocab_size": 1024, "initializer_range": 0.08, "max_position_embeddings": 512}


@pytest.fixture
def mixture(tmp_path: Path) -> Callable[..., str]:
    """Saves a tiny mixture, and gives its folder."""
    return lambda kind="Qwen3Moe", **sizes: str(
        save_tiny_model(tmp_path / kind, kind, **{**SIZES, **KINDS[kind], **sizes})
    )


def train(config: Any, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


class ChangeTraining(Callback):
    """Calls `start` with the trainer when training starts, and `gradients` at each step's gradients."""

    def __init__(self, start: Any = None, gradients: Any = None) -> None:
        self._start, self._gradients = start, gradients

    def on_train_start(self, trainer: Any) -> None:
        if self._start:
            self._start(trainer.model)

    def on_gradients(self, trainer: Any, step: int) -> None:
        if self._gradients:
            self._gradients(trainer.model)


def expert_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".experts." in name and "lora_" in name]


def hf_losses(config: Any, dataset: TokenDataset, folder: Path) -> list[float]:
    """The losses of the HF Trainer with PEFT's own adapter, from the same start on the same rows in the same order."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    seed_everything(config.training.seed)
    ours = attach(load_model(config.model, torch.device("cpu"), "fp32"), config.peft)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=names,
        rank_pattern={r"mlp\.experts\.\w+": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(load_model(config.model, torch.device("cpu"), "fp32"), settings)
    model.load_state_dict(ours.state_dict())
    order = [int(i) for epoch in range(3) for i in epoch_order(len(dataset), config.training.seed, epoch)]
    rows = [
        {
            "input_ids": e.input_ids.tolist(),
            "labels": [int(i) if m else -100 for i, m in zip(e.input_ids, e.loss_mask, strict=True)],
            "attention_mask": [1] * len(e.input_ids),
        }
        for e in (dataset[i] for i in order)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=8, bf16=False,
        learning_rate=config.training.lr, lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(load_tokenizer(config.model))
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", slow_but(["Qwen3Moe"], ["Qwen3Moe", "Mixtral"]))
def test_losses_are_those_of_peft_in_the_hf_trainer(
    kind: str, small_config: Config, mixture: Any, tmp_path: Path
) -> None:
    training = {"max_steps": STEPS, "lr": 5e-3, "scheduler": "constant", "warmup_ratio": 0.0, "epochs": 3}
    data = {"max_examples": ROWS, "train": small_config().data.train}
    model = {"id": mixture(kind), "seq_len": 64}
    config = small_config(model=model, data=data, training=training, peft={"r": 4, "lora_alpha": 8})
    plan = TrainingWrapper(config).plan()
    run = train(config)
    lines = (run.logs / "metrics.jsonl").read_text().splitlines()
    ours = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]
    theirs = hf_losses(plan.config, plan.train, tmp_path / "hf")
    assert len(ours) == len(theirs) == STEPS and ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_frozen_experts_stop_the_run(small_config: Config, mixture: Any) -> None:
    """The fault that other trainers do not see: attention trains, the loss falls, and the experts stay as they were."""
    freeze = ChangeTraining(start=lambda model: [p.requires_grad_(False) for p in expert_parameters(model)])
    with pytest.raises(TrainingError, match=r"4 of 12 .* and 16 experts do not train.*layers.0.mlp.experts.down_proj"):
        train(small_config(model={"id": mixture()}, training={"max_steps": 3}), freeze)


def test_an_expert_without_gradient_is_named_though_its_neighbours_train(small_config: Config, mixture: Any) -> None:
    def cut(model: Any) -> None:
        for parameter in expert_parameters(model)[:2]:  # A and B of one parameter
            rows, columns = parameter.shape
            if parameter.grad is not None and rows == 8:  # A: 4 experts of rank 2
                parameter.grad[2:4] = 0
            elif parameter.grad is not None and columns == 8:
                parameter.grad[:, 1::4] = 0

    with pytest.raises(TrainingError, match=r"1 of 12 adapted modules and .*no gradient reaches them.*_proj\[1\]"):
        train(small_config(model={"id": mixture()}, training={"max_steps": 3}), ChangeTraining(gradients=cut))


def test_an_expert_without_tokens_is_named_and_stops_nothing(
    small_config: Config, mixture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def avoid_the_last(model: Any) -> None:
        for name, router in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                router.data[:] = torch.linspace(3.0, 0.0, len(router))[:, None] * router.data[:1]

    config = small_config(model={"id": mixture(num_experts=12)}, training={"max_steps": 3})
    train(config, ChangeTraining(start=avoid_the_last))
    lines = [line for line in caplog.messages if "not routed to yet" in line]
    assert len(lines) == 1 and "adapted experts were not routed to yet" in lines[0] and "experts.down_proj[" in lines[0]


@pytest.mark.slow
def test_identity_experts_have_tokens_and_nothing_to_train(small_config: Config, mixture: Any) -> None:
    """LongCat's: their slices of one of the two parameters are never used."""
    sizes = {
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32,
        "num_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "num_hidden_layers": 2,
    }  # fmt: skip
    train(small_config(model={"id": mixture("LongcatFlash", **sizes)}, training={"max_steps": 3}))


def test_the_lens_sees_each_expert_and_changes_no_bit(small_config: Config, mixture: Any) -> None:
    base = mixture()

    def train_with(is_enabled: bool) -> RunFolder:
        lens = {"enabled": is_enabled, "scalars_every": 1, "probe_every": 2}
        return train(small_config(model={"id": base, "seq_len": 64}, training={"max_steps": 4}, lens=lens))

    seen, blind = train_with(True), train_with(False)
    assert read_weights(seen) == read_weights(blind)
    captures, adapter = LensStore(seen.lens), LoRAParameterAnalyzer(seen.adapter).weights()
    name = "model.layers.1.mlp.experts.gate_up_proj[3]"
    norms = captures.series("adapter_gradients", "norm_b")
    assert len(norms.names) == 8 + 2 * 2 * 4 and (norms.column(name) > 0).all()
    assert np.nanmax(captures.series("adapter_gradients", "self_check").values) < 1e-5
    assert np.isfinite(captures.series("optimizer_state", "update_rms_b").column(name)[1:]).all()
    assert captures.series("base_weights", "norm").column(name) > 0
    last = next(one for one in adapter if one.record.name == name)
    assert torch.equal(captures.snapshot("adapters", 4)[f"{name}.b"], last.b)
    load = RouterLoadAnalyzer().analyze(CheckpointAnalyzer(seen.root).recording)["layers"]
    shares = np.array([layer["share"] for layer in load.values()])
    assert shares.shape == (2, 4) and np.allclose(shares.sum(1), 1) and (shares > 0).all()
    assert all(1 < layer["effective"] <= 4 for layer in load.values())


def read_weights(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()
