"""The HF Trainer's special cases: evaluation before training, the best model at the end, failures, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.config.lens_section import LensSection
from training_lens.config.schema import TrainingConfig
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import LensStore
from training_lens.models.adapters import attach
from training_lens.models.factory import load_model, load_tokenizer

ROWS, BATCH, ACCUMULATION, STEPS = 20, 2, 4, 3  # ten batches: the third step has only two of them
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def trainer_with(lens: TrainingLensFramework, folder: Path, kind: Any = None, **more: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    config = TrainingConfig()
    torch.manual_seed(0)
    model = attach(load_model(config.model, torch.device("cpu"), "fp32"), config.peft)
    rows = [{"input_ids": [40 + (i + j) % 97 for j in range(8 + i % 5)]} for i in range(ROWS)]
    rows = [{**row, "labels": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "bf16": False,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    collator = DataCollatorForSeq2Seq(load_tokenizer(config.model))
    data = {"train_dataset": rows, "eval_dataset": rows[:2], "data_collator": collator}
    arguments = TrainingArguments(**{**settings, **more})
    return (kind or Trainer)(model, arguments, callbacks=[lens.trainer_callback()], **data)


@pytest.fixture
def lens(tmp_path: Path) -> TrainingLensFramework:
    return TrainingLensFramework(tmp_path / "lens")


def test_evaluation_before_training_is_ignored(lens: TrainingLensFramework, tmp_path: Path) -> None:
    trainer = trainer_with(lens, tmp_path)
    trainer.evaluate()
    trainer.train()
    store = LensStore(tmp_path / "lens")
    assert store.series("loss", "loss").steps.tolist() == [1, 2, 3]
    assert store.manifest.settings["steps_per_epoch"] == STEPS


@pytest.mark.slow
def test_the_last_snapshot_is_of_the_last_step_not_of_the_best_model(tmp_path: Path) -> None:
    lens = TrainingLensFramework(tmp_path / "lens", LensSection(snapshot_every=2))
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    most = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that the first is the best
    trainer = trainer_with(lens, tmp_path, load_best_model_at_end=True, **every, **most)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    store = LensStore(tmp_path / "lens")
    assert store.snapshot_steps("adapters") == [1, 2, 3]
    assert store.series("evaluation", "loss").steps.tolist() == [1, 2, 3]
    norms, last = store.series("adapter_weights", "norm_b"), store.snapshot("adapters", 3)
    for name in norms.names:
        assert float(last[f"{name}.b"].norm()) == pytest.approx(norms.column(name)[2], rel=1e-5)


@pytest.mark.slow
def test_a_trainers_own_loss_is_left_out_with_a_warning(
    lens: TrainingLensFramework, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_with(lens, tmp_path, label_smoothing_factor=0.1).train()
    store = LensStore(tmp_path / "lens")
    assert "loss" not in store.table("loss").column_names
    assert store.series("loss", "grad_norm").steps.tolist() == [1, 2, 3]
    assert "saw no training loss" in caplog.text


@pytest.mark.slow
def test_after_a_failed_training_nothing_is_captured_twice(lens: TrainingLensFramework, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = trainer_with(lens, tmp_path, save_strategy="steps", save_steps=1)
    breaks = Break()
    trainer.add_callback(breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(breaks)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    store = LensStore(tmp_path / "lens")
    for table, measure in (("loss", "loss"), ("adapter_gradients", "self_check"), ("adapter_weights", "norm_b")):
        assert store.series(table, measure).steps.tolist() == [1, 2, 3]
    assert store.series("adapter_gradients", "self_check").values.max() <= 1e-5
    hooks = [p._post_accumulate_grad_hooks for p in trainer.model.parameters()]
    assert not any(hooks)


TWO = """
import sys
from pathlib import Path
from training_lens.core.framework import TrainingLensFramework
from tests.core.test_trainer_callback import trainer_with
folder = Path(sys.argv[1])
trainer_with(TrainingLensFramework(folder / "lens"), folder, ddp_backend="gloo", max_grad_norm=0.05).train()
"""


@pytest.mark.slow
def test_of_two_processes_one_captures_and_leaves_unknown_values_out(
    tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": "2"}
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path)],
            env={**os.environ, **around, "RANK": str(i), "LOCAL_RANK": str(i), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    store = LensStore(tmp_path / "lens")
    assert set(store.table("loss").column_names).isdisjoint({"loss", "grad_norm", "clip"})
    assert store.series("adapter_gradients", "self_check").values.max() <= 1e-5
    assert store.manifest.settings["processes"] == 2


@pytest.fixture
def unused_port() -> Callable[[], int]:
    import socket

    def port() -> int:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return int(found.getsockname()[1])

    return port
