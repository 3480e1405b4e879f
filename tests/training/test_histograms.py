"""Histograms count every number of every factor once, and training sees nothing of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training_lens import TrainingWrapper
from training_lens.runs.run_folder import RunFolder
from training_lens.training import histograms as module
from training_lens.training.histograms import BINS, HistogramWriter, compute_histograms
from training_lens.training.loop.callbacks import Callback

Config = Callable[..., Any]
DATA = {"train": [{"question": f"Where is box {i}?", "answer": f"In hall {i}."} for i in range(24)], "val_ratio": 0.25}
SHORT = {"max_steps": 4, "epochs": 1, "batch_size": 4}


def test_numbers_are_counted_in_equal_bins_from_least_to_greatest() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 31.5, 32.0])  # bins of width 1; the greatest is in the last
    counts = [2, 1, *[0] * 28, 0, 2]
    assert compute_histograms({"x": values}) == {"x": {"counts": counts, "low": 0.0, "high": 32.0}}


@pytest.mark.parametrize("at_once", [50, 2**22])
def test_the_counts_are_those_of_numpy(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(30, 7), "b": torch.rand(7, 30) * 1e-30, "c": torch.randn(4), "d": torch.randn(14, 15)}
    found = compute_histograms(tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        numbers, values = tensor.flatten().numpy(), found[name]
        assert (values["low"], values["high"]) == (numbers.min(), numbers.max())
        counts = np.histogram(numbers, BINS)[0]
        assert sum(values["counts"]) == numbers.size and all(type(count) is int for count in values["counts"])
        # Up to a number that lies on an edge, which is rounded otherwise there.
        assert np.abs(np.cumsum(values["counts"]) - np.cumsum(counts)).max() <= 1


def test_equal_numbers_are_all_in_the_last_bin() -> None:
    found = compute_histograms({"zero": torch.zeros(6), "one": torch.full((2, 3), 0.1)})
    assert found["zero"] == {"counts": [*[0] * 31, 6], "low": 0.0, "high": 0.0}
    assert found["one"] == {"counts": [*[0] * 31, 6], "low": pytest.approx(0.1), "high": pytest.approx(0.1)}


def test_what_is_not_finite_is_counted_apart() -> None:
    inf, nan = torch.inf, torch.nan
    found = compute_histograms(
        {"some": torch.tensor([nan, 0.0, inf, 32.0, -inf]), "all": torch.tensor([nan, nan, nan, inf, inf])}
    )
    assert found["some"] == {"counts": [1, *[0] * 30, 1], "low": 0.0, "high": 32.0, "not_finite": 3}
    assert found["all"] == {"counts": [0] * 32, "low": 0.0, "high": 0.0, "not_finite": 5}


class Spy(Callback):
    """Keeps what the parameters and gradients were before the update."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, dict[str, torch.Tensor]]] = {}

    def on_gradients(self, trainer: Any, step: int) -> None:
        named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        self.seen[step] = {
            "weights": {name: p.detach().clone() for name, p in named.items()},
            "gradients": {name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        }


def lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.histograms_file.read_text().splitlines()]


def test_a_run_writes_the_gradients_before_clipping_and_the_weights_before_the_update(small_config: Config) -> None:
    spy = Spy()
    config = small_config(
        data=DATA,
        tracking={"tensorboard": True, "histograms_every": 3},
        training={**SHORT, "max_grad_norm": 1e-3},
        peft={"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]},
    )
    run = RunFolder(Path(TrainingWrapper(config, callbacks=(spy,)).train().run_dir))
    written = lines(run)
    assert [line["step"] for line in written] == [1, 3, 4]
    for line in written:
        for kind, seen in spy.seen[line["step"]].items():
            found = line["histograms"][kind]
            assert found == {plain(name): values for name, values in compute_histograms(seen).items()}
    names = set(written[0]["histograms"]["weights"])
    layer = "model.layers.0.self_attn.q_proj"
    assert {f"{layer}.A", f"{layer}.B", f"{layer}.magnitude"} < names
    assert any("embed" in name or "lm_head" in name for name in names)


def plain(name: str) -> str:
    """A parameter's name as PEFT has it, in words of the base model."""
    changes = {
        "base_model.model.": "", ".lora_A.default.weight": ".A", ".lora_B.default.weight": ".B",
        ".lora_magnitude_vector.default.weight": ".magnitude", ".modules_to_save.default": "",
    }  # fmt: skip
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


@pytest.mark.slow
def test_the_adapter_is_that_of_a_run_without_them_to_the_bit(small_config: Config) -> None:
    """With samples, too, and a dropout that draws."""
    shown = {"tensorboard": True, "histograms_every": 2, "samples": 2, "sample_tokens": 4}
    sections = {"data": DATA, "peft": {"r": 4, "lora_dropout": 0.2}, "training": {**SHORT, "eval_steps": 2}}
    runs = [TrainingWrapper(small_config(**sections, tracking=more)).train().run_dir for more in ({}, shown)]
    off, on = (load_file(RunFolder(Path(run)).adapter / "adapter_model.safetensors") for run in runs)
    assert off.keys() == on.keys() and all(torch.equal(off[name], on[name]) for name in off)
    assert not RunFolder(Path(runs[0])).histograms_file.exists() and len(lines(RunFolder(Path(runs[1])))) == 3
    assert len(RunFolder(Path(runs[1])).samples_file.read_text().splitlines()) == 3


@pytest.mark.slow
def test_what_fails_is_said_once_and_ends_no_run(
    small_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(HistogramWriter):
        def on_train_start(self, trainer: Any) -> None:
            super().on_train_start(trainer)
            self._journal.close()
            self._journal._file = Path("/dev/full").open("a")  # noqa: SIM115

    watcher = Full(tmp_path / "histograms.jsonl", every=1)
    summary = TrainingWrapper(small_config(data=DATA, training=SHORT), callbacks=(watcher,)).train()
    said = [record.getMessage() for record in caplog.records if "no histograms" in record.getMessage()]
    assert summary.status == "finished" and len(said) == 1 and "step 1: " in said[0] and "No space left" in said[0]
