"""Several processes train what one trains: losses, adapters, captures; with the base replicated, and sharded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork_processes, join_processes  # type: ignore[import-not-found]
from safetensors.torch import load_file
from slow_cases import slow_but  # type: ignore[import-not-found]
from tiny_models import SIZES, save_tiny_model, tiny_model  # type: ignore[import-not-found]

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.config.schema import PeftSection
from training_lens.core.lens_store import LensStore
from training_lens.core.modules import adapter_modules
from training_lens.errors import InterruptedRunError
from training_lens.models.adapters import attach, restore_adapter, save_adapter, trainable_parameters
from training_lens.models.sharding import shard_base
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder, runs_folder
from training_lens.training.loop.callbacks import Callback
from training_lens.utils.processes import Processes

Config = Callable[..., TrainingConfig]
LENS = {"scalars_every": 1, "spectra_every": 2, "probe_every": 2, "snapshot_every": 2}  # by steps, not by the clock
BASES = ["replicated", "sharded"]
MEASURED = ("adapter_weights", "adapter_gradients", "spectra", "base_weights", "divergence", "row_losses")


def train(config: TrainingConfig, processes: int = 1) -> RunFolder:
    """The run of a config, which names its id."""
    if processes == 1:
        TrainingWrapper(config).train()
    else:
        assert join_processes(fork_processes(processes, TrainingWrapper(config).train)) == [0] * processes
    return folder_of(config)


def folder_of(config: TrainingConfig) -> RunFolder:
    """The folder of a run whose config names its id."""
    output = config.output
    return RunFolder(runs_folder(output.base_output_dir, output.experiment_name) / str(output.run_id))


def losses(run: RunFolder) -> list[float]:
    """Of every step and validation."""
    return [line["loss"] for line in read_metrics(run.metrics_file)]


def adapter(run: RunFolder) -> torch.Tensor:
    """All parameters of the saved adapter, one after the other."""
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def samples(run: RunFolder) -> list[Any]:
    """The sampled answers of every validation."""
    return [line["samples"] for line in map(json.loads, run.samples_file.read_text().splitlines())]


def assert_close_runs(run: RunFolder, other: RunFolder, atol: float = 1e-5) -> None:
    """Losses to float32 rounding, adapters to 1e-5."""
    assert losses(run) == pytest.approx(losses(other), rel=2e-5)
    assert (adapter(run) - adapter(other)).norm() <= atol * adapter(other).norm()


def assert_close_captures(run: RunFolder, other: RunFolder) -> None:
    stores = LensStore(run.lens), LensStore(other.lens)
    for name in MEASURED:
        tables = [store.table(name) for store in stores]
        assert tables[0].column_names == tables[1].column_names and len(tables[0]) == len(tables[1]) > 0, name
        for column in tables[0].column_names:
            values = [table.column(column).to_pylist() for table in tables]
            if isinstance(next((v for v in values[0] if v is not None), None), float):
                found, wanted = (np.array(v, dtype=float) for v in values)
                assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True), (name, column)
            elif column not in ("seconds",):
                assert values[0] == values[1] or name == "spectra", (name, column)


@pytest.mark.parametrize("base", slow_but(["sharded"], BASES))
def test_two_processes_train_and_capture_what_one_does(small_config: Config, base: str) -> None:
    sections: dict[str, Any] = {"training": {"max_steps": 4}, "lens": LENS, "tracking": {"samples": 2}}
    sections["peft"] = {"lora_dropout": 0.1}
    alone = train(small_config(**sections, output={"run_id": "one"}))
    distributed = {"base": base}
    both = train(small_config(**sections, output={"run_id": "two"}, distributed=distributed), 2)
    assert_close_runs(both, alone)
    assert_close_captures(both, alone)
    assert samples(both) == samples(alone) != []


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "dora": {"peft": {"use_dora": True}},
    "dropout": {"peft": {"lora_dropout": 0.2}},
    "dora, dropout": {"peft": {"use_dora": True, "lora_dropout": 0.2}, "training": {"gradient_checkpointing": True}},
    "pissa": {"peft": {"init": "pissa"}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "4bit": {"model": {"id": "embedded", "quantization": "4bit"}},
    "frozen experts": {"model": {"id": "Mixtral"}, "peft": {"target_parameters": []}},
    "experts": {"model": {"id": "Mixtral"}},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with experts."""
    return str(save_tiny_model(tmp_path_factory.mktemp("experts"), "Mixtral", vocab_size=704))


@pytest.fixture
def config_of(small_config: Config, experts: str) -> Config:
    """The config of a variant on a base: 200 steps, at a rate at which rounding does not grow."""

    def build(variant: str, base: str, **sections: dict[str, Any]) -> TrainingConfig:
        found = {name: dict(keys) for name, keys in VARIANTS[variant].items()}
        if found.get("model", {}).get("id") == "Mixtral":
            found["model"]["id"] = experts
        found["training"] = {"max_steps": 200, "epochs": 40, "batch_size": 6, "lr": 5e-4} | found.get("training", {})
        found["distributed"] = {"base": base}
        return small_config(**{**found, **sections})

    return build


@pytest.mark.distributed
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_and_four_processes_train_what_one_does_over_200_steps(config_of: Config, variant: str, base: str) -> None:
    alone = train(config_of(variant, base, output={"run_id": "one"}))
    for count in (2, 4):
        several = train(config_of(variant, base, output={"run_id": f"of-{count}"}), count)
        assert_close_runs(several, alone)


@pytest.mark.distributed
@pytest.mark.parametrize("base", BASES)
def test_a_fixed_number_of_processes_gives_the_same_bits_also_with_dropout(small_config: Config, base: str) -> None:
    sections: dict[str, Any] = {"peft": {"lora_dropout": 0.2}, "distributed": {"base": base}}
    one, other = (train(small_config(**sections, output={"run_id": name}), 2) for name in ("a", "b"))
    assert losses(one) == losses(other) and torch.equal(adapter(one), adapter(other))


class Stop(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, trainer: Any, report: Any) -> None:
        if report.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until(config: TrainingConfig, step: int, processes: int) -> RunFolder:
    """The run that a signal to all of its processes ends after a step."""

    def begin() -> None:
        with pytest.raises(InterruptedRunError):
            TrainingWrapper(config, callbacks=(Stop(step),)).train()

    return _finish(config, processes, begin)


def resume_until(run: RunFolder, config: TrainingConfig, step: int | None, processes: int) -> None:
    """Go on with the run on so many processes with this base, until a step, or to its end."""
    settings = {"distributed": {"base": config.distributed.base}}

    def go_on() -> None:
        if step is None:
            TrainingWrapper.resume(run, settings)
            return
        with pytest.raises(InterruptedRunError):
            TrainingWrapper.resume(run, settings, callbacks=(Stop(step),))

    _finish(config, processes, go_on)


def _finish(config: TrainingConfig, processes: int, action: Callable[[], object]) -> RunFolder:
    assert join_processes(fork_processes(processes, action)) == [0] * processes
    return folder_of(config)


@pytest.mark.distributed
@pytest.mark.parametrize("order", [("replicated", "sharded", "replicated"), ("sharded", "replicated", "sharded")])
def test_a_run_goes_on_from_two_processes_to_one_to_four_and_from_one_kind_of_base_to_the_other(
    config_of: Config, order: tuple[str, str, str]
) -> None:
    alone = train(config_of("dropout", "replicated", output={"run_id": "one"}))
    bases = [config_of("dropout", base, output={"run_id": "moved"}) for base in order]
    run = train_until(bases[0], 60, 2)
    resume_until(run, bases[1], 120, 1)
    resume_until(run, bases[2], None, 4)
    assert_close_runs(run, alone)


@pytest.mark.distributed
@pytest.mark.parametrize("base", BASES)
def test_a_run_with_dropout_resumes_exactly_on_as_many_processes(small_config: Config, base: str) -> None:
    sections: dict[str, Any] = {"peft": {"lora_dropout": 0.2}, "distributed": {"base": base}}
    whole = train(small_config(**sections, output={"run_id": "whole"}), 2)
    config = small_config(**sections, output={"run_id": "cut"})
    cut = train_until(config, 3, 2)
    resume_until(cut, config, None, 2)
    assert losses(cut) == losses(whole) and torch.equal(adapter(cut), adapter(whole))


def check_slices(folder: Path) -> None:
    """Fill each process's share of a layer with its own number: the whole weight has all of them, in order."""
    processes = Processes(torch.device("cpu"), is_base_sharded=True)
    model = attach(tiny_model(), PeftSection(r=4), [])
    shard_base(model, processes.device)
    module = next(m for m in adapter_modules(model) if m.name.endswith("q_proj"))
    share = module.module.get_base_layer().weight
    share.to_local().fill_(processes.index + 1)
    weight, rows = module.base_weight(), SIZES["hidden_size"] // processes.count
    assert weight is not None
    wanted = torch.arange(1, processes.count + 1).repeat_interleave(rows)
    assert torch.equal(weight, wanted[:, None].expand_as(weight).float())
    assert type(module.module.get_base_layer().weight).__name__ == "DTensor", "the layer is a share again"
    parameters = dict(trainable_parameters(model))
    for i, parameter in enumerate(parameters.values()):
        parameter.data.fill_(i + 1)
    if processes.is_main:
        save_adapter(model, folder)
    processes.wait_for_all()
    for parameter in parameters.values():
        parameter.data.zero_()
    restore_adapter(model, folder)
    assert all(bool((p == i + 1).all()) for i, p in enumerate(parameters.values()))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.distributed)])
def test_what_is_gathered_and_what_is_saved_is_whole(tmp_path: Path, count: int) -> None:
    assert join_processes(fork_processes(count, check_slices, tmp_path / "adapter")) == [0] * count
