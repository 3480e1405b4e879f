"""The states that a run keeps: evenly spaced, the same after a resume, bounded, and no bit of the training changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_lens import TrainingWrapper
from training_lens.analysis.checkpoint_analyzer import CheckpointAnalyzer
from training_lens.core.lens_store import LensStore
from training_lens.runs.checkpoint_format import list_checkpoint_steps, list_checkpoints, verify_checkpoint
from training_lens.runs.run_folder import RunFolder
from training_lens.training.kept_states import choose_state_steps
from training_lens.training.loop.callbacks import Callback
from training_lens.training.run_check import check_run
from training_lens.utils.files import read_json

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(small_config_in: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A config of ten steps on a model whose steps take milliseconds, with dropout, so that random state matters."""
    few = {"collectors": ["adapter_weights"], "probe_tokens": 0}

    def config(lens: dict[str, Any] | None, **output: Any) -> Any:
        sections: dict[str, Any] = {"lens": few | lens} if lens is not None else {}
        return small_config_in(
            tmp_path_factory.mktemp("outputs"),
            data={"max_examples": 80},
            peft={"lora_dropout": 0.1},
            output=output,
            **sections,
        )

    return config


def train(config: Any, *callbacks: Callback) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, callbacks=callbacks).train().run_dir))


@pytest.fixture(scope="module")
def whole(build: Build) -> RunFolder:
    return train(build({"keep_states": 4}))


class Stop(Callback):
    """Stops the run after a step, as Ctrl-C does, with the later state already written."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step == self._step:
            raise KeyboardInterrupt


def read_states(run: RunFolder) -> dict[str, Any]:
    """Every file of every state by name: its sha256; of state.json what is no timing."""
    found: dict[str, Any] = {}
    for folder in list_checkpoints(run.states):
        for name, sha256 in verify_checkpoint(folder).files.items():
            values = read_json(folder / name) if name == "state.json" else sha256
            found[f"{folder.name}/{name}"] = values | {"seconds": 0} if isinstance(values, dict) else values
    return found


def test_the_steps_are_the_middles_of_equal_parts() -> None:
    assert choose_state_steps(600, 6) == (50, 150, 250, 350, 450, 550)
    assert choose_state_steps(10, 4) == (2, 4, 7, 9)
    assert choose_state_steps(3, 6) == (1, 2, 3) and choose_state_steps(1, 6) == (1,) and not choose_state_steps(9, 0)


@pytest.mark.slow
def test_keeping_states_changes_no_bit_of_the_adapter(build: Build, whole: RunFolder) -> None:
    without = train(build(None))
    names = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((whole.adapter / n).read_bytes() == (without.adapter / n).read_bytes() for n in names)
    assert not without.states.exists()
    kept = list(train(build({"keep_states": 0})).root.rglob("states"))
    assert not kept and list_checkpoint_steps(whole.states) == [2, 4, 7, 9]


def test_a_resumed_run_keeps_the_same_states(build: Build, whole: RunFolder) -> None:
    config = build({"keep_states": 4}, run_id="cut").replace_keys(training={"save_steps": 5})
    with pytest.raises(KeyboardInterrupt):
        train(config, Stop(8))
    cut = RunFolder(Path(config.output.base_output_dir) / "experiments/default/runs/cut")
    assert list_checkpoint_steps(cut.checkpoints) == [5] and list_checkpoint_steps(cut.states) == [2, 4, 7]
    (cut.states / "step-00000007" / "optimizer.safetensors").write_bytes(b"of an attempt that went on otherwise")
    TrainingWrapper.resume(cut)
    assert read_states(cut) == read_states(whole) and len(read_states(cut)) == 20


@pytest.mark.slow
def test_fewer_states_stay_where_the_room_is_bounded(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    config = build({"keep_states": 6, "states_megabytes": 1})
    config = config.replace_keys(peft={"r": 16, "target_modules": "auto"})
    with caplog.at_level(logging.INFO):
        run = train(config)
    sizes = [sum(f.stat().st_size for f in state.rglob("*") if f.is_file()) for state in list_checkpoints(run.states)]
    assert 0 < len(sizes) < 6 and sum(sizes) <= 1.05e6, sizes  # JSON files and headers come on top
    assert f"{len(sizes)} of 6 states of the run stay for explanations" in caplog.text


@pytest.mark.slow
def test_a_state_that_cannot_be_written_ends_no_run(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    class Block(Callback):
        def on_train_start(self, trainer: Any) -> None:
            folder = Path(trainer.checkpoints.folder).parent / "lens"
            folder.mkdir(exist_ok=True)
            (folder / "states").write_text("a file where the folder should be")

    run = train(build({"keep_states": 4}), Block())
    assert run.status == "finished" and "no further state of the run is kept for explanations" in caplog.text


@pytest.mark.slow
def test_doctor_finds_and_drops_a_damaged_state(build: Build) -> None:
    run = train(build({"keep_states": 4}))
    assert {check.name: check.found for check in check_run(run)}["states"] == "4"
    file = list_checkpoints(run.states)[1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    damaged = {check.name: check for check in check_run(run)}["states"]
    assert not damaged.ok and "optimizer.safetensors differs" in damaged.found
    (run.lens / "lens.json").unlink()  # it is written again from the folders of tables, of which states are none
    assert all(check.ok for check in check_run(run, repair=True))
    assert list_checkpoint_steps(run.states) == [2, 7, 9]
    assert "states" not in LensStore(run.lens).tables()
    assert CheckpointAnalyzer(run.root).analyze().findings
