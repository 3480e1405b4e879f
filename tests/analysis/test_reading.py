"""Whatever a trainer left is opened for what it is, and what cannot be read says why."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from training_lens.analysis.open_recording import open_recording
from training_lens.config.lens_section import LensSection
from training_lens.core.lens_writer import LensWriter
from training_lens.core.modules import module_record
from training_lens.core.types import RUN, Captured, DataType, LensManifest
from training_lens.errors import AdapterError, LensError, ModelLoadingError
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder

PAIR = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 6), torch.ones(5, 2))}
WHOLE_LOG = list(range(1, 7))


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state


def test_the_trainers_output_is_read_with_its_log(trainer_output: Path) -> None:
    recording = open_recording(trainer_output)
    assert recording.status == "finished" and recording.manifest.origin == "transformers"
    assert recording.captures.snapshot_steps("adapters") == [2, 4, 6]
    assert recording.settings["total_steps"] == 6 and recording.settings["steps_per_epoch"] == 3
    logged = [line for line in state_of(trainer_output / "checkpoint-6")["log_history"] if "loss" in line]
    loss, norm = recording.series("loss", "loss"), recording.series("loss", "grad_norm")
    assert loss.steps.tolist() == WHOLE_LOG and loss.column(RUN).tolist() == pytest.approx([e["loss"] for e in logged])
    assert norm.column(RUN).tolist() == pytest.approx([entry["grad_norm"] for entry in logged])
    assert recording.series("loss", "lr").column(RUN)[0] == pytest.approx(1e-2)
    assert recording.series("evaluation", "loss").steps.tolist() == [2, 4, 6]
    assert {module.rank for module in recording.modules} == {2, 4}


def test_one_checkpoint_of_the_trainer_knows_its_step_and_log(trainer_output: Path) -> None:
    recording = open_recording(trainer_output / "checkpoint-4")
    assert recording.captures.snapshot_steps("adapters") == [4] and recording.status == "unknown"
    assert recording.series("loss", "loss").steps.tolist() == [1, 2, 3, 4]


def test_without_a_trainers_state_losses_are_unknown_and_the_rest_reads(trainer_output: Path, tmp_path: Path) -> None:
    shutil.copytree(trainer_output, tmp_path / "copy", ignore=shutil.ignore_patterns("trainer_state.json"))
    recording = open_recording(tmp_path / "copy")
    assert not recording.has("loss") and len(recording.series("adapter_weights", "norm_update").steps) == 3


@pytest.mark.slow
def test_a_run_without_captures_is_read_from_what_it_saved(
    run_without_captures: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "training_lens"):
        recording = open_recording(run_without_captures.root)
    assert "has no captures" in caplog.text and "without gradients" in caplog.text
    assert recording.status == "finished" and recording.name == run_without_captures.run_id
    assert recording.captures.snapshot_steps("adapters") == [4] and recording.settings["total_steps"] == 4
    lines = read_metrics(run_without_captures.metrics_file)
    steps = [line for line in lines if line["kind"] == "step"]
    assert recording.series("loss", "loss").column(RUN).tolist() == pytest.approx([line["loss"] for line in steps])
    base = next(line["loss"] for line in lines if line["kind"] == "base")
    assert recording.series("evaluation", "base_loss").column(RUN)[0] == pytest.approx(base)
    assert recording.has("base_weights") and not recording.has("adapter_gradients")


def test_parts_of_a_run_are_read_too(run_without_captures: RunFolder) -> None:
    whole = open_recording(run_without_captures.root).series("adapter_weights", "norm_update")
    for part in (
        run_without_captures.checkpoints,
        run_without_captures.checkpoints / "step-00000004",
        run_without_captures.checkpoints / "step-00000004" / "adapter",
        run_without_captures.adapter,
    ):
        found = open_recording(part).series("adapter_weights", "norm_update")
        assert found.names == whole.names and (found.values == whole.values).all()


def write_captures(folder: Path) -> None:
    manifest = LensManifest((module_record("m.layers.3.q_proj", (2, 6), (5, 2), 1.0),), tables={"loss": DataType.LOSS})
    writer = LensWriter(folder, manifest, LensSection())
    writer.add("loss", 1, Captured({"loss": torch.ones(1)}))
    writer.close()


def test_captures_belong_to_the_run_around_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    write_captures(run.root / "lens")
    for status in ("finished", "failed"):
        (run.metadata / "summary.json").write_text(json.dumps({"status": status}))
        for place in (run.root, run.root / "lens"):
            recording = open_recording(place)
            assert (recording.status, recording.name, recording.folder) == (status, "run", run.root)
            assert recording.modules[0].layer == 3 and recording.series("loss", "loss").column(RUN).tolist() == [1.0]
    (run.metadata / "summary.json").write_text(json.dumps({"status": "running"}))
    assert open_recording(run.root).status == "interrupted"  # nobody holds its lock
    with run.hold_lock():
        assert open_recording(run.root).status == "running"


def test_captures_may_stand_alone(tmp_path: Path) -> None:
    write_captures(tmp_path / "kept")
    recording = open_recording(tmp_path / "kept")
    assert (recording.name, recording.status, recording.folder) == ("kept", "unknown", tmp_path / "kept")


def refused(path: Path, *words: str, error: type[Exception] = LensError) -> None:
    with pytest.raises(error) as caught:
        open_recording(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    refused(tmp_path / "rael", "no folder", f"Did you mean '{tmp_path / 'real'}'")
    refused(tmp_path / "real", "is empty", "checkpoint-*", "adapter_config.json")
    (tmp_path / "real" / "notes.txt").write_text("x")
    refused(tmp_path / "real", "is not a run", "found notes.txt")
    refused(tmp_path / "real" / "notes.txt", "is a file")


def test_a_run_that_has_kept_nothing_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    (run.metadata / "summary.json").write_text(json.dumps({"status": "failed"}))
    (run.metadata / "config.json").write_text("{}")
    refused(run.root, "failed", "nothing to analyse", "no captures", "no checkpoints", "lens.enabled=true")
    refused(tmp_path, "contains 1 run.", str(run.root))


@pytest.mark.parametrize("within", ["", "checkpoint-2"])
def test_a_full_fine_tune_is_refused(tmp_path: Path, within: str) -> None:
    folder = tmp_path / "full" / within
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    refused(tmp_path / "full", "full model", "LoRA", str(folder / "model.safetensors"))


def test_other_adapters_and_pickles_are_refused(tmp_path: Path, save_adapter: Callable[..., Path]) -> None:
    refused(save_adapter("ia3", PAIR, peft_type="IA3"), "IA3", "only LoRA", error=AdapterError)
    refused(save_adapter("pissa", PAIR, init_lora_weights="pissa_niter_4"), "pissa", error=AdapterError)
    refused(save_adapter("alpha", PAIR, lora_alpha=None), "lora_alpha", error=AdapterError)
    pickled = save_adapter("pickled", PAIR)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "adapter_model.bin may run code", "convert", error=AdapterError)
    half = save_adapter("half", PAIR)
    save_file({"base_model.model.m.lora_A.weight": torch.ones(2, 6)}, half / "adapter_model.safetensors")
    refused(half, "of m A has (2, 6) and B has nothing", error=AdapterError)
    save_file({"base_model.model.m.weight": torch.ones(2, 6)}, half / "adapter_model.safetensors")
    refused(half, "no pair of LoRA matrices", error=AdapterError)


def test_checkpoints_of_different_runs_are_refused(tmp_path: Path, save_adapter: Callable[..., Path]) -> None:
    first = save_adapter("out/checkpoint-1", PAIR)
    wide = {name: (torch.ones(2, 7), b) for name, (_, b) in PAIR.items()}
    second = save_adapter("out/checkpoint-2", wide)
    refused(tmp_path / "out", next(iter(PAIR)), "6 inputs", "7 inputs", str(first), str(second))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def test_a_truncated_adapter_is_named_and_others_are_read(
    tmp_path: Path, save_adapter: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    alone = save_adapter("alone", PAIR) / "adapter_model.safetensors"
    cut(alone)
    refused(alone.parent, str(alone), "broken", error=AdapterError)
    save_adapter("out/checkpoint-1", PAIR)
    last = save_adapter("out/checkpoint-2", PAIR) / "adapter_model.safetensors"
    cut(last)
    recording = open_recording(tmp_path / "out")
    assert recording.captures.snapshot_steps("adapters") == [1]
    assert str(last) in caplog.text and "skipping a checkpoint" in caplog.text


def test_a_damaged_trainers_state_is_named(trainer_output: Path, tmp_path: Path) -> None:
    shutil.copytree(trainer_output / "checkpoint-2", tmp_path / "copy")
    (tmp_path / "copy" / "trainer_state.json").write_text('{"global_step": 2, "max_steps"')
    refused(tmp_path / "copy", "trainer_state.json", "damaged")


def test_a_loss_that_is_no_number_stays_one(tmp_path: Path, save_adapter: Callable[..., Path]) -> None:
    folder = save_adapter("adapter", PAIR)
    history = [{"step": 1, "loss": math.nan, "epoch": 1.0}, {"step": 2, "loss": 1.0, "epoch": 2.0}]
    state = {"global_step": 2, "max_steps": 9, "num_train_epochs": 9, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    losses = open_recording(folder).series("loss", "loss").column(RUN)
    assert math.isnan(losses[0]) and losses[1] == 1.0


def test_a_base_that_is_given_must_be_the_right_one(
    trainer_output: Path, base_folder: Path, tmp_path: Path, save_adapter: Callable[..., Path]
) -> None:
    assert open_recording(trainer_output, base=base_folder).has("base_weights", "norm")
    other = save_adapter("other", PAIR)
    with pytest.raises(LensError, match=r"has none of the 1 weights .*q_proj"):
        open_recording(other, base=base_folder)
    with pytest.raises(ModelLoadingError, match="no folder"):
        open_recording(trainer_output, base=tmp_path / "nothing")
    with pytest.raises(LensError, match="is neither a folder nor a model id"):
        open_recording(trainer_output, base="no-such-model")
    assert not open_recording(other).has("base_weights")
