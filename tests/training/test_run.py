"""A run from config to adapter: what is saved, same seed same run, killed and resumed is undisturbed."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork, fork_processes, join_processes  # type: ignore[import-not-found]
from safetensors.torch import load_file

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.core.lens_store import LensStore
from training_lens.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    InterruptedRunError,
    TrainingLensError,
)
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_lookup import find_run
from training_lens.training.loop.callbacks import Callback, MetricsCollector

Config = Callable[..., TrainingConfig]
ROWS = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(24)]
TIMING = {"seconds", "time"}


def steps_of(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their timings."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in MetricsCollector.read(run.metrics_file)]


def assert_same_run(a: RunFolder, b: RunFolder) -> None:
    """Bit for bit: every step's loss and norm, the saved adapter, the last checkpoint's optimizer and random state."""
    assert steps_of(a) == steps_of(b)
    for name in ("artifacts/adapter/adapter_model.safetensors", *last_checkpoint_files(a)):
        one, two = load_file(a.root / name), load_file(b.root / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name


def last_checkpoint_files(run: RunFolder) -> list[str]:
    last = max(run.checkpoints.iterdir())
    return [str(p.relative_to(run.root)) for p in last.rglob("*.safetensors")]


def train(config: TrainingConfig, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


@pytest.fixture(scope="module")
def whole(small_config_in: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An undisturbed run of `small_config`. For reading alone."""
    tracked = {"training": {"logging_steps": 2}, "tracking": {"tensorboard": True}}
    return train(small_config_in(tmp_path_factory.mktemp("outputs"), **tracked))


def test_a_run_leaves_everything_in_its_folder(whole: RunFolder) -> None:
    run = whole
    files = {str(p.relative_to(run.root)) for p in run.root.rglob("*") if p.is_file()}
    assert {
        "artifacts/adapter/adapter_config.json",
        "artifacts/adapter/adapter_model.safetensors",
        "artifacts/tokenizer/tokenizer.json",
        "checkpoints/step-00000006/manifest.json",
        "checkpoints/step-00000006/optimizer.safetensors",
        "checkpoints/step-00000006/rng.safetensors",
        "logs/metrics.jsonl",
        "logs/run.log",
        "metadata/config.json",
        "metadata/data.json",
        "metadata/environment.json",
        "metadata/summary.json",
    } <= files
    assert any("tfevents" in name for name in files)
    assert not any(".tmp-" in name or name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert run.status == "finished"
    config = run.read_metadata("config.json")
    assert (
        config["training"]["lr"] == 3e-3 and config["data"]["template"] == "chat" and config["model"]["seq_len"] == 2048
    )
    assert config["output"]["run_id"] == run.run_id
    data = run.read_metadata("data.json")
    assert data["domains"] == ["forest", "hill", "lake"] and data["train_examples"] == 48


def test_whatever_watches_a_run_changes_no_bit_of_its_adapter(small_config: Config, whole: RunFolder) -> None:
    """Captures, live findings, row losses, kept states, validations, answers and histograms, all at once."""
    watched = train(
        small_config(
            training={"logging_steps": 1, "eval_steps": 3},
            lens={"enabled": True, "keep_states": 3, "spectra_every": 3, "probe_every": 3},
            tracking={"tensorboard": True, "samples": 1, "histograms_every": 3},
        )
    )
    assert list(watched.states.iterdir()) and watched.samples_file.is_file(), "it was watched"
    own, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, watched))
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.slow
def test_the_model_is_freed_when_the_run_has_ended(small_config: Config) -> None:
    held = list[weakref.ref[torch.nn.Module]]()

    class Look(Callback):
        def on_train_end(self, trainer: Any) -> None:
            held.extend(weakref.ref(module) for module in trainer.model.modules())

    gc.collect()
    gc.disable()  # what nothing refers to is freed all the same
    try:
        TrainingWrapper(small_config(training={"max_steps": 1}, lens={}), callbacks=(Look(),)).train()
        assert len(held) > 50 and not [module() for module in held if module() is not None]
    finally:
        gc.enable()


def test_tensorboard_events_hold_the_losses(whole: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.logs))
    events.Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    lines = {line["step"]: line["loss"] for line in steps_of(whole) if line["kind"] == "step"}
    assert set(losses) == {1, 2, 4, 6}
    assert all(losses[step] == pytest.approx(lines[step], rel=1e-6) for step in losses)
    assert [e.step for e in events.Scalars("validation/loss")] == [0, 6]


def test_same_seed_same_run(small_config: Config, tiny_base: Path) -> None:
    settings: dict[str, Any] = {"model": {"id": str(tiny_base)}, "peft": {"lora_dropout": 0.1}}
    runs = [train(small_config(**settings, training={"max_steps": 2})) for _ in range(2)]
    assert_same_run(*runs)
    other = train(small_config(**settings, training={"max_steps": 2, "seed": 5}))
    assert steps_of(other) != steps_of(runs[0])


@pytest.mark.slow
def test_rows_in_memory_train_like_the_same_rows_in_a_file(
    small_config: Config, write_rows: Callable[..., Path]
) -> None:
    path = str(write_rows(ROWS))
    runs = [train(small_config(data={"train": rows, "val_ratio": 0.2})) for rows in (ROWS, path)]
    losses = [[(line["kind"], line["loss"]) for line in steps_of(run)] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) > 2  # the examples' ids differ: they name their files


def test_the_public_api_trains_on_lists_of_dicts(tmp_path: Path) -> None:
    sections = {"training": {"max_steps": 2}, "lens": {"report": False}, "output": {"base_output_dir": str(tmp_path)}}
    summary = TrainingWrapper(TrainingConfig(data={"train": ROWS}, **sections)).train()
    assert summary.steps == 2 and summary.validation_loss is None and summary.adapter_step == 2


@pytest.mark.slow
def test_dora_trains(small_config: Config) -> None:
    summary = TrainingWrapper(small_config(peft={"use_dora": True}, training={"max_steps": 3, "epochs": 1})).train()
    adapter = load_file(Path(summary.run_dir) / "artifacts/adapter/adapter_model.safetensors")
    assert any("magnitude" in name for name in adapter)
    assert summary.validation_loss is not None and summary.base_validation_loss is not None
    assert summary.validation_loss < summary.base_validation_loss


def test_an_adapter_that_does_not_fit_is_refused_before_data_is_prepared(small_config: Config) -> None:
    config = small_config(peft={"target_modules": ["q_porj"]})
    with pytest.raises(AdapterError, match="no module is called 'q_porj'"):
        TrainingWrapper(config).plan()
    assert not list(Path(config.output.base_output_dir).rglob("*.arrow"))


@pytest.mark.slow
def test_bf16_trains_with_float32_adapters(small_config: Config) -> None:
    training = {"precision": "bf16", "max_steps": 3, "batch_size": 6}
    config = small_config(data={"val_ratio": 0.25, "max_examples": 24}, training=training)
    summary = TrainingWrapper(config).train()
    adapter = load_file(Path(summary.run_dir) / "artifacts/adapter/adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    assert summary.validation_loss is not None and summary.base_validation_loss is not None
    assert summary.validation_loss < summary.base_validation_loss


def test_a_run_is_never_written_over(small_config_in: Config, whole: RunFolder) -> None:
    config = small_config_in(whole.root.parents[3], output={"run_id": whole.run_id})
    with pytest.raises(ConfigurationError, match=rf"the run '{whole.run_id}' exists already"):
        TrainingWrapper(config).train()


class Stop(Callback):
    """Sends this process a signal after a step, as a scheduler or a person would."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), self.number)


def interrupted(config: TrainingConfig, step: int, number: int = signal.SIGTERM) -> RunFolder:
    """The run that a signal ends after a step."""
    config = config.replace_keys(output={"run_id": "cut"})
    with pytest.raises(InterruptedRunError) as caught:
        TrainingWrapper(config, callbacks=(Stop(step, number),)).train()
    assert caught.value.exit_code == 128 + number
    return RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/cut")


@pytest.mark.slow
def test_a_signal_saves_and_exits_and_the_resumed_run_is_undisturbed(small_config: Config, whole: RunFolder) -> None:
    """SIGINT here, SIGTERM in the other tests."""
    cut = interrupted(small_config(), 3, signal.SIGINT)
    assert cut.status == "interrupted" and max(p.name for p in cut.checkpoints.iterdir()) == "step-00000003"
    assert TrainingWrapper.resume(cut).status == "finished"
    assert_same_run(whole, cut)


RESUMED: dict[str, dict[str, Any]] = {
    "lora_plus": {
        "peft": {"variant": "rslora", "lora_dropout": 0.1, "lora_plus_ratio": 8},
        # At the width's own rate, eight times that for B learns or not by what dropout draws.
        "training": {"lr": 1e-3, "scheduler": "cosine_with_restarts", "scheduler_cycles": 2, "min_lr_ratio": 0.1},
    },
    "adafactor": {"peft": {"use_dora": True}, "training": {"optimizer": "adafactor"}},
    "adamw_8bit": {"model": {"id": "embedded"}, "peft": {"r": 32}, "training": {"optimizer": "adamw_8bit"}},
    "pissa": {"peft": {"init": "pissa", "lora_dropout": 0.1}, "training": {"weight_decay": 0.1}},
    "whole_modules": {"peft": {"modules_to_save": ["norm"]}, "training": {"gradient_checkpointing": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_whatever_trains_resumes_undisturbed(small_config: Config, kind: str) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    whole, cut = train(small_config(**RESUMED[kind])), interrupted(small_config(**RESUMED[kind]), 3)
    summary = TrainingWrapper.resume(cut)
    assert_same_run(whole, cut)
    assert summary.validation_loss is not None and summary.base_validation_loss is not None
    assert summary.validation_loss < summary.base_validation_loss


@pytest.mark.slow
def test_going_on_from_an_adapter_resumes_undisturbed(small_config: Config) -> None:
    first = TrainingWrapper(small_config(training={"max_steps": 2})).train()
    section = {"from_adapter": first.run_dir, "r": 4}
    whole, cut = train(small_config(peft=section)), interrupted(small_config(peft=section), 3)
    TrainingWrapper.resume(cut)
    assert_same_run(whole, cut)


def test_sigkill_then_resume_equals_the_undisturbed_run(small_config: Config, whole: RunFolder) -> None:
    config = small_config(training={"save_steps": 2}, output={"run_id": "killed"})
    ended = fork(TrainingWrapper(config, callbacks=(Stop(3, signal.SIGKILL),)).train)
    ended.join()
    assert ended.exitcode == -signal.SIGKILL
    killed = RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/killed")
    assert [path.name for path in killed.checkpoints.iterdir()] == ["step-00000002"]
    assert killed.has_died and killed.status == "interrupted"
    assert killed.read_metadata("summary.json")["run_dir"] == str(killed.root)
    unfinished = find_run("killed", config.output.base_output_dir)
    assert TrainingWrapper.resume(unfinished).status == "finished"
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(small_config: Config, whole: RunFolder) -> None:
    cut = interrupted(small_config(training={"save_steps": 2}), 4)
    file = max(cut.checkpoints.iterdir()) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    TrainingWrapper.resume(cut)
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_resume_refuses_a_finished_run_and_changed_data(small_config: Config, write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    run = interrupted(small_config(data={"train": str(path)}), 1)
    write_rows([*ROWS, {"question": "new", "answer": "row"}])
    with pytest.raises(CheckpointError, match="no longer what it was"):
        TrainingWrapper.resume(run)
    write_rows(ROWS)
    TrainingWrapper.resume(run)
    with pytest.raises(CheckpointError, match="is finished after 3 steps; there is nothing to resume"):
        TrainingWrapper.resume(run)


def test_a_failed_run_says_so(small_config: Config) -> None:
    class Fail(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        TrainingWrapper(small_config(output={"run_id": "failed"}), callbacks=(Fail(),)).train()
    run = RunFolder(Path(small_config().output.base_output_dir) / "experiments/default/runs/failed")
    assert run.status == "failed"
    assert "out of luck" in (run.logs / "run.log").read_text()


def train_with_two_processes(config: TrainingConfig) -> None:
    assert join_processes(fork_processes(2, TrainingWrapper(config).train)) == [0, 0]


def run_under_torchrun(*arguments: str) -> None:
    """`training-lens train` under torchrun, with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "training_lens", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


def assert_same_losses(a: RunFolder, b: RunFolder) -> None:
    """Step by step, up to float32 rounding."""
    losses = [[(s["step"], s["epoch"], s["loss"]) for s in steps_of(run) if s["kind"] == "step"] for run in (a, b)]
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-4)
    validation = [run.read_metadata("summary.json")["validation_loss"] for run in (a, b)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_as_one(small_config: Config) -> None:
    alone = train(small_config(training={"max_steps": 2}, lens={}))
    training, output = {"max_steps": 2}, {"run_id": "two"}
    train_with_two_processes(small_config(training=training, output=output, model={"device": "cpu"}, lens={}))
    two = RunFolder(alone.root.parent / "two")
    assert_same_losses(alone, two)
    assert two.read_metadata("data.json")["global_batch_size"] == 8
    rows = [LensStore(run.lens).table("row_losses").to_pylist() for run in (alone, two)]
    assert [(row["step"], row["module"]) for row in rows[0]] == [(row["step"], row["module"]) for row in rows[1]]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-4)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_steps(small_config: Config) -> None:
    """Five examples a step, which two processes cannot share evenly, and settings typed again."""
    training = {"batch_size": 5, "max_steps": 6}
    whole, cut = train(small_config(training=training)), interrupted(small_config(training=training), 3)
    output = f"output.base_output_dir={cut.root.parents[3]}"
    run_under_torchrun("--resume", "cut", output, "training.batch_size=5", "training.lr=3e-3", "model.device=cpu")
    assert_same_losses(whole, cut)


@pytest.mark.slow
def test_one_process_goes_on_with_the_steps_of_two(
    small_config: Config, whole: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    cut = interrupted(small_config(), 3)
    config, data = cut.read_metadata("config.json"), cut.read_metadata("data.json")
    config["training"]["batch_size"] = 4
    cut.write_metadata("config.json", config)
    cut.write_metadata("data.json", {**data, "processes": 2})
    with caplog.at_level(logging.INFO, logger="training_lens"):
        TrainingWrapper.resume(cut)
    assert_same_run(whole, cut)
    assert "begun by 2 processes, resumed by 1: a step keeps its 8 examples" in caplog.text


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_refused_where_its_steps_would_change(small_config: Config) -> None:
    cut = interrupted(small_config(), 2)
    config, data = cut.read_metadata("config.json"), cut.read_metadata("data.json")
    recorded = {key: value for key, value in data.items() if key not in ("processes", "global_batch_size")}
    cut.write_metadata("data.json", recorded)
    config["training"]["batch_size"] = 4  # as two processes would have begun it
    cut.write_metadata("config.json", config)
    with pytest.raises(CheckpointError, match="has 6 steps an epoch, on 1 processes it would have 12"):
        TrainingWrapper.resume(cut)
    config["training"]["batch_size"] = 8
    cut.write_metadata("config.json", config)
    assert TrainingWrapper.resume(str(cut.root)).steps == 6


@pytest.mark.slow
def test_settings_typed_again_are_taken_and_other_ones_refused(small_config: Config) -> None:
    training = {"epochs": 1, "lr": 3e-3, "batch_size": 8}
    cut = interrupted(small_config(), 1)
    with pytest.raises(ConfigurationError) as caught:
        TrainingWrapper.resume(cut, {"training": {**training, "epochs": 3}, "peft": {"r": 8, "rank_pattern": {}}})
    text = str(caught.value)
    assert "- peft.r: the run has 4, you gave 8" in text and "- training.epochs: the run has 1.0, you gave 3.0" in text
    assert "training.epochs would change the learning rate of every step" in text and "peft.from_adapter" in text
    with pytest.raises(ConfigurationError, match=r"training\.epoch: unknown key; did you mean 'training\.epochs'"):
        TrainingWrapper.resume(cut, {"training": {"epoch": 3}})
    settings: dict[str, dict[str, Any]] = {
        "training": {**training, "logging_steps": 3},
        "model": {"seq_len": None},
        "data": {"template": "auto"},
    }
    assert TrainingWrapper.resume(cut, settings).status == "finished"
    with pytest.raises(CheckpointError, match=rf"finished after 6 steps.* peft\.from_adapter={cut.root}"):
        TrainingWrapper.resume(cut, settings)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "train", "a" * 5000, "a...: File name too long. Give another path"),
        ("data", "train", "rows\0.jsonl", "data.train: "),
        ("model", "id", "my model (1)", "model.id: 'my model (1)' is not a folder here, and cannot be a hub id"),
        ("model", "id", "a\0b", "cannot be a hub id"),
        ("model", "id", Path("/no/such/model"), "model.id: no folder '/no/such/model'"),
        ("output", "base_output_dir", Path("/proc/out"), "output.base_output_dir: cannot write in '/proc/out'"),
    ],
)
def test_a_plan_raises_only_our_errors(tmp_path: Path, section: str, key: str, value: Any, message: str) -> None:
    sections: dict[str, Any] = {"data": {"train": ROWS}, "output": {"base_output_dir": str(tmp_path)}}
    sections[section] = {**sections.get(section, {}), key: value}
    with pytest.raises(TrainingLensError) as caught:
        TrainingWrapper(TrainingConfig(**sections)).plan()
    assert message in str(caught.value) and len(str(caught.value)) < 500
