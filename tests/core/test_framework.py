"""The same run through our loop, the HF Trainer, TRL's SFTTrainer and a loop by hand gives the same captures."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import mark_slow

from training_lens.config.lens_section import LensSection
from training_lens.config.schema import TrainingConfig
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import LensStore
from training_lens.errors import LensError
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import load_model, load_tokenizer
from training_lens.runs.run_folder import RunFolder
from training_lens.training.run import TrainingWrapper

STEPS, BATCH, ACCUMULATION = 4, 2, 2
CLIP = 0.05  # so low that every step is clipped: captures must be those before it
Config = Callable[..., TrainingConfig]


@dataclass
class OwnRun:
    """A run of our loop: where its captures are, the rows in the order of its steps, the adapter that it began with."""

    lens: Path
    config: TrainingConfig
    rows: list[dict[str, list[int]]]
    start: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def own(small_config_in: Config, tmp_path_factory: pytest.TempPathFactory) -> OwnRun:
    folder = tmp_path_factory.mktemp("own")
    config = small_config_in(
        folder,
        data={"max_examples": STEPS * BATCH * ACCUMULATION},
        training={
            "batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": CLIP,
        },
        lens={"spectra_every": 1, "probe_every": 2},
    )
    wrapper = TrainingWrapper(config)
    plan = wrapper.plan()
    trainer, _ = wrapper._build_trainer(RunFolder(folder / "look").create(), plan)
    start = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model)}
    order = [int(i) for step in plan.schedule.iterate_steps() for i in step.examples]
    rows = [_row(plan.train[i]) for i in order]
    summary = TrainingWrapper(config).train()
    return OwnRun(RunFolder(Path(summary.run_dir)).lens, config, rows, start)


def _row(example: Any) -> dict[str, list[int]]:
    mask = [int(m) for m in example.loss_mask]
    labels = [int(i) if m else -100 for i, m in zip(example.input_ids, mask, strict=True)]
    return {"input_ids": [int(i) for i in example.input_ids], "attention_mask": [1] * len(mask), "labels": labels}


def adapted(own: OwnRun) -> Any:
    """The model with the adapter that our run began with."""
    model = attach(load_model(own.config.model, torch.device("cpu"), "fp32"), own.config.peft)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            parameter.copy_(own.start[name])
    return model


def by_hf_trainer(own: OwnRun, lens: TrainingLensFramework, folder: Path) -> None:
    """Its own log has the norms before clipping, which must be the lens's."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments = TrainingArguments(**_arguments(folder), logging_first_step=True)
    collator = DataCollatorForSeq2Seq(load_tokenizer(own.config.model))
    callbacks = [lens.trainer_callback()]
    trainer = Trainer(adapted(own), arguments, train_dataset=own.rows, data_collator=collator, callbacks=callbacks)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    loss = LensStore(lens.folder)
    norms, clips = loss.series("loss", "grad_norm").column("run"), loss.series("loss", "clip").column("run")
    assert norms[0] == pytest.approx(logged[0], rel=1e-5)
    np.testing.assert_allclose(norms * clips, CLIP, rtol=1e-3)


def by_sft_trainer(own: OwnRun, lens: TrainingLensFramework, folder: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**_arguments(folder), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    SFTTrainer(
        adapted(own),
        arguments,
        train_dataset=Dataset.from_list(own.rows),
        processing_class=load_tokenizer(own.config.model),
        callbacks=[lens.trainer_callback()],
    ).train()


def _arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "bf16": False,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "report_to": [],
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
    }


def by_hand(own: OwnRun, lens: TrainingLensFramework, _folder: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    model, size = adapted(own), BATCH * ACCUMULATION
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=3e-3, weight_decay=0.0)
    collate = DataCollatorForSeq2Seq(load_tokenizer(own.config.model), return_tensors="pt")
    model.train()
    with lens.watch(model, optimizer):
        for at in range(0, len(own.rows), size):
            rows = own.rows[at : at + size]
            targets = sum(label != -100 for row in rows for label in row["labels"][1:])
            total = torch.zeros(())
            for part in (rows[:BATCH], rows[BATCH:]):
                loss = model(**collate(part), num_items_in_batch=targets).loss
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            lens.step(total, lr=3e-3)


WAYS = {"hf_trainer": by_hf_trainer, "sft_trainer": by_sft_trainer, "by_hand": by_hand}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["hf_trainer", "by_hand", pytest.param("sft_trainer", marks=pytest.mark.slow)])
def test_every_loop_captures_the_same_gradients_steps_and_losses(own: OwnRun, way: str, tmp_path: Path) -> None:
    lens = TrainingLensFramework(tmp_path / "lens", LensSection(spectra_every=1, probe_every=2), probe=own.rows[:4])
    WAYS[way](own, lens, tmp_path)
    ours, theirs = LensStore(own.lens), LensStore(tmp_path / "lens")
    for table, measure in (
        *(("adapter_gradients", m) for m in ("norm_a", "norm_b", "cosine_previous")),
        *(("adapter_weights", m) for m in ("norm_a", "norm_b", "norm_update", "norm_step")),
        *(("optimizer_state", m) for m in ("update_rms_a", "update_rms_b")),
        *(("loss", m) for m in ("loss", "lr")),
    ):
        wanted, found = ours.series(table, measure), theirs.series(table, measure)
        assert found.names == wanted.names
        assert found.steps.tolist() == wanted.steps.tolist() == list(range(1, STEPS + 1))
        near = 2e-5 if measure.startswith("cosine") else 1e-7  # of vectors at right angles: float32's noise against 1
        np.testing.assert_allclose(found.values, wanted.values, rtol=2e-3, atol=near, err_msg=f"{table}.{measure}")
    check = theirs.series("adapter_gradients", "self_check").values
    assert check.shape == (STEPS, len(theirs.manifest.modules))
    assert check.max() <= 1e-5


@pytest.mark.slow
def test_the_lens_changes_no_bit_of_the_adapter(small_config: Config) -> None:
    adapters = []
    for section in ({"enabled": False}, {"spectra_every": 1, "probe_every": 1, "snapshot_every": 1}):
        config = small_config(
            data={"val_ratio": 0.2}, peft={"r": 4, "lora_dropout": 0.1}, lens={"report": False, **section}
        )
        run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_a_resumed_run_continues_its_captures(small_config: Config) -> None:
    from training_lens.errors import InterruptedRunError
    from training_lens.training.loop.callbacks import Callback

    class Stop(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            if report.step == 4:
                signal.raise_signal(signal.SIGTERM)

    config = small_config(lens={"report": False})
    with pytest.raises(InterruptedRunError):
        TrainingWrapper(config, callbacks=(Stop(),)).train()
    (run,) = (RunFolder(p) for p in Path(config.output.base_output_dir).glob("experiments/default/runs/*"))
    assert LensStore(run.lens).series("loss", "loss").steps.tolist() == [1, 2, 3, 4]
    TrainingWrapper.resume(run)
    store = LensStore(run.lens)
    assert store.series("adapter_gradients", "norm_b").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert store.series("adapter_gradients", "self_check").values.max() <= 1e-5


@pytest.mark.parametrize(
    ("section", "steps"), [mark_slow(({}, [1, 2, 3, 4])), ({"scalars_every": 50}, [1, 4])], ids=str
)
def test_a_failed_run_keeps_the_captures_of_its_last_step(
    section: dict[str, Any], steps: list[int], small_config: Config
) -> None:
    from training_lens.errors import TrainingError
    from training_lens.training.loop.callbacks import Callback

    class Poison(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            if report.step == 3:
                trainer.parameters[5].data.fill_(float("nan"))

    config = small_config(lens={"report": False, "spectra_every": 50, "snapshot_every": 50, **section})
    with pytest.raises(TrainingError):
        TrainingWrapper(config, callbacks=(Poison(),)).train()
    (lens,) = Path(config.output.base_output_dir).glob("experiments/default/runs/*/lens")
    norms = LensStore(lens).series("adapter_gradients", "norm_b")
    assert norms.steps.tolist() == steps  # also of the step that failed, where the pace passed it over
    assert np.isfinite(norms.values[:-1]).all()
    assert np.isnan(norms.values[-1]).any()


def test_a_model_without_an_adapter_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = load_model(TrainingConfig().model, torch.device("cpu"), "fp32").requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LensError, match="full fine-tune"), TrainingLensFramework(tmp_path).watch(model, optimizer):
        raise AssertionError("the block must not be entered")


def test_a_failing_collector_is_switched_off_and_the_rest_continue(
    own: OwnRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from training_lens.core.collector import CaptureContext, DataCollector
    from training_lens.core.types import Captured, DataType

    class Broken(DataCollector):
        name, data_type = "broken", DataType.LOSS

        def collect(self, context: CaptureContext, step: int) -> Captured:
            if step == 2:
                raise ValueError("no such thing")
            return Captured({"one": torch.ones(1)})

    lens = TrainingLensFramework(tmp_path / "lens", collectors=["adapter_gradients", Broken()])
    by_hand(replace(own, rows=own.rows[: 3 * BATCH * ACCUMULATION]), lens, tmp_path)
    store = LensStore(tmp_path / "lens")
    assert store.series("broken", "one").steps.tolist() == [1]
    assert store.series("adapter_gradients", "norm_a").steps.tolist() == [1, 2, 3]
    assert "switches off broken after step 2" in caplog.text


@pytest.mark.slow
def test_a_full_disk_ends_the_capture_and_not_the_run(
    small_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    summary = TrainingWrapper(small_config(lens={"report": False, "flush_seconds": 0})).train()
    assert summary.status == "finished"
    assert caplog.text.count("the lens stops capturing") == 1
