"""The losses of single rows that a step computes anyway: right however it is cut, recorded once, no bit changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from slow_cases import slow_but

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.core.lens_store import LensStore
from training_lens.core.row_losses import BYTES_PER_VISIT, RowLosses, choose_interval, select_rows
from training_lens.errors import InterruptedRunError
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback, StepReport
from training_lens.training.loop.dataloader import DataLoader
from training_lens.training.loop.trainer import Trainer

Config = Callable[..., TrainingConfig]
SCALARS_ONLY: dict[str, Any] = {"collectors": ["adapter_weights"], "probe_tokens": 0}


def build_trainer(config: TrainingConfig, folder: Path) -> Trainer:
    wrapper = TrainingWrapper(config)
    trainer = wrapper._build_trainer(RunFolder(folder).create(), wrapper.plan())[0]
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters:  # so that the adapter adds something
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainer.callbacks = ()
    return trainer


def take_step(trainer: Trainer) -> tuple[StepReport, np.ndarray]:
    """The report of the first step, and the losses per token that an evaluation before it gives."""
    plan = next(trainer.schedule.iterate_steps())
    options = EvaluationOptions(trainer.processes, "fp32", 1000, trainer.pad_id)
    sums = token_sums(trainer.model, trainer.dataset.select(plan.examples), options)
    return trainer.train_step(plan), sums.nll / sums.tokens


@pytest.mark.parametrize(
    ("is_packed", "tokens"),
    slow_but([(True, 300), (False, 10**6)], [*product((True, False), (10**6, 300, 1))]),
    ids=lambda value: (
        {True: "packed", False: "padded"}.get(value, "") if isinstance(value, bool) else f"micro-batches of {value}"
    ),
)
def test_each_row_reports_the_loss_that_an_evaluation_finds(
    is_packed: bool, tokens: int, small_config: Config, tmp_path: Path
) -> None:
    trainer = build_trainer(small_config(training={"micro_batch_tokens": tokens}), tmp_path / "run")
    trainer.dataloader = DataLoader(trainer.dataset, trainer.processes, trainer.pad_id, is_packed)
    report, wanted = take_step(trainer)
    assert report.row_losses == pytest.approx(wanted, rel=1e-4)
    assert np.dot(report.row_losses, report.row_tokens) == pytest.approx(
        report.loss * report.supervised_tokens, rel=1e-5
    )


@pytest.mark.parametrize("head", slow_but(["_head_trains"], ["_head_is_plain", "_head_trains"]))
def test_other_output_layers_report_the_same(head: str, small_config: Config, tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path / "run")
    trainer.engine.__dict__["_head_is_plain"] = False
    trainer.engine._head_trains = head == "_head_trains"
    report, wanted = take_step(trainer)
    assert report.row_losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_validation_rows_are_recorded_at_each_validation_from_the_base_on(small_config: Config) -> None:
    """At no further pass, in the order in which they are measured; their sums are the validation losses."""
    run = RunFolder(Path(TrainingWrapper(small_config(training={"eval_steps": 3}, lens=SCALARS_ONLY)).train().run_dir))
    store = LensStore(run.lens)
    rows = store.table("held_out_row_losses").to_pylist()
    assert {row["step"] for row in rows} == {0, 3, 6} and len(rows) == 3 * 24
    evaluation = store.table("evaluation").to_pylist()
    for step, measure in ((0, "base_loss"), (3, "loss"), (6, "loss")):
        nll = sum(row["loss"] * row["tokens"] for row in rows if row["step"] == step)
        mean = nll / sum(row["tokens"] for row in rows if row["step"] == step)
        found = [each[measure] for each in evaluation if each["step"] == step and each[measure] is not None]
        assert found == pytest.approx([mean], rel=1e-5)


class Watch(Callback):
    """Keeps the rows of each step; after step `stop` it interrupts the run."""

    def __init__(self, stop: int = 0) -> None:
        self.rows, self._stop = dict[int, RowLosses](), stop

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        self.rows[report.step] = report.losses_by_row
        if report.step == self._stop:
            os.kill(os.getpid(), signal.SIGTERM)


def read_table(run: RunFolder) -> list[dict[str, Any]]:
    return list(LensStore(run.lens).table("row_losses").to_pylist())


@pytest.mark.slow
def test_a_run_records_every_visit_once_and_trains_the_same_adapter(small_config: Config) -> None:
    """With the lens and without it, and interrupted between two checkpoints and resumed."""
    weights, watch = {"weights": [2.0]}, Watch()  # a row may come twice in a step
    with_lens = small_config(data=weights, lens=SCALARS_ONLY)
    run = RunFolder(Path(TrainingWrapper(with_lens, callbacks=(watch,)).train().run_dir))
    wanted = [
        {"step": step, "module": name, "loss": np.float32(loss), "tokens": tokens}
        for step, rows in watch.rows.items()
        for name, (loss, tokens) in dict(zip(rows.ids, zip(rows.losses, rows.tokens, strict=True), strict=True)).items()
    ]
    assert read_table(run) == wanted
    assert any(len(set(rows.ids)) < len(rows.ids) for rows in watch.rows.values())

    cut = with_lens.replace_keys(output={"run_id": "cut"})
    with pytest.raises(InterruptedRunError):
        TrainingWrapper(cut, callbacks=(Watch(stop=5),)).train()
    resumed = RunFolder(Path(TrainingWrapper.resume(run.root.parent / "cut").run_dir))
    assert read_table(resumed) == wanted

    off = small_config(data=weights, lens=SCALARS_ONLY | {"row_losses_megabytes": 0})
    without = RunFolder(Path(TrainingWrapper(off).train().run_dir))
    assert "row_losses" not in LensStore(without.lens).tables()
    adapters = [load_file(r.adapter / "adapter_model.safetensors") for r in (run, resumed, without)]
    assert all(torch.equal(adapters[0][name], other[name]) for other in adapters[1:] for name in adapters[0])
    listed = (run.lens / "files.json").read_text()
    assert "row_losses/" in listed


def test_where_all_visits_do_not_fit_the_same_rows_have_all_of_theirs() -> None:
    visits = 10**6 // BYTES_PER_VISIT
    assert [choose_interval(n, 1) for n in (1, visits, visits + 1, 10 * visits)] == [1, 1, 2, 10]
    assert choose_interval(1, 0) == 0
    rows = RowLosses([f"rows.jsonl:{i}" for i in range(1000)], np.arange(1000.0).tolist(), [1] * 1000)
    chosen = [select_rows(rows, every=4) for _ in range(2)]
    assert chosen[0].rows == chosen[1].rows and 200 < len(chosen[0].rows) < 300
    assert all(
        rows.losses[rows.ids.index(name)] == loss
        for name, loss in zip(chosen[0].rows, chosen[0].scalars["loss"].tolist(), strict=True)
    )
