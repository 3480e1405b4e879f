"""Recordings written through the lens's own store, and short real trainings of the packaged model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from training_lens.analysis.findings import Finding
from training_lens.analysis.findings.diagnosis import CHECKS
from training_lens.config.lens_section import LensSection
from training_lens.core.arrow import MODULE, STEP
from training_lens.core.capture import RunFacts
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import LensStore
from training_lens.core.lens_writer import LensWriter
from training_lens.core.probe import Probe
from training_lens.core.recording import Recording
from training_lens.core.segments import SegmentedTable
from training_lens.core.types import RUN, LensManifest, ModuleRecord

Table = Mapping[str, np.ndarray]  # measure -> (steps,) for the run or (steps, modules)
Change = Callable[[Any, int], None]


def modules(layers: int = 8, kinds: Sequence[str] = ("q", "v"), rank: int = 16) -> tuple[ModuleRecord, ...]:
    return tuple(
        ModuleRecord(f"model.layers.{i}.self_attn.{kind}_proj", i, kind, rank, 64, 64, 2.0)
        for i in range(layers)
        for kind in kinds
    )


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Recording]:
    """A recording with these tables, each `(steps, {measure: values})`, through the store and back."""

    def build(
        tables: Mapping[str, tuple[np.ndarray, Table]],
        settings: Mapping[str, Any] | None = None,
        of: tuple[ModuleRecord, ...] = modules(),
        status: str = "finished",
    ) -> Recording:
        folder = tmp_path / f"lens{len(list(tmp_path.iterdir()))}"
        LensWriter(folder, LensManifest(modules=of, settings=settings or {}), LensSection())
        for name, table in tables.items():
            SegmentedTable(folder / name, -1).append(build_table(*table, [m.name for m in of]))
        store = LensStore(folder)
        return Recording("made", folder, store.manifest, store, status)

    return build


def build_table(steps: np.ndarray, measures: Table, names: Sequence[str]) -> pa.Table:
    """All steps at once, as the lens would have written them one by one."""
    rows = (RUN,) if next(iter(measures.values())).ndim == 1 else names
    modules = pa.array(np.tile(np.arange(len(rows), dtype=np.int32), len(steps)))
    values = {name: pa.array(np.ravel(column[: len(steps)]).astype(np.float32)) for name, column in measures.items()}
    return pa.table({
        STEP: pa.array(np.repeat(steps, len(rows)).astype(np.int32)),
        MODULE: pa.DictionaryArray.from_arrays(modules, pa.array(rows, pa.string())),
        **values,
    })  # fmt: skip


class Healthy:
    """The tables of a sound run in memory: 200 steps over 2 epochs, 20 validations. Change them, then record them."""

    def __init__(self, steps: int = 200, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        self.modules = modules()
        n, m = steps, len(self.modules)
        t, e = np.arange(1, n + 1), np.arange(n // 20, n + 1, n // 20)
        every, level = np.ones((n, m)), noise.lognormal(0, 0.5, m)
        rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * t / n))[:, None] + 1e-6
        self.tables: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]] = {
            "loss": (t, {
                "loss": 3 - 0.35 * np.log(t) + noise.normal(0, 0.05, n), "lr": rate[:, 0],
                "clip": np.full(n, 0.5), "epoch": 2 * t / n,
            }),
            "evaluation": (e, {"loss": 3.1 - 0.35 * np.log(e) + noise.normal(0, 0.004, 20)}),
            "divergence": (e, {
                "kl": 0.1 * np.log(1 + e), "loss": 3.1 - 0.35 * np.log(e), "base_loss": np.full(20, 3.2),
            }),
            "base_weights": (np.zeros(1, int), {"norm": np.full((1, m), 10.0)}),
            "adapter_weights": (t, {
                "norm_a": every, "norm_b": every * 0.01 * t[:, None], "norm_step": level * rate * 10,
                "norm_update": level * 4 * np.cumsum(rate, 0),
            }),
            "adapter_gradients": (t, {
                "norm_a": level * noise.lognormal(0, 0.3, (n, m)), "norm_b": level * noise.lognormal(0, 0.3, (n, m)),
                "cosine_mean": noise.normal(0.05, 0.05, (n, m)),
            }),
            "optimizer_state": (t, {f"update_rms_{of}": noise.lognormal(0, 0.1, (n, m)) for of in "ab"}),
            "spectra": (e, {"energy_rank": np.full((20, m), 9.0)}),
        }  # fmt: skip

    def values(self, table: str, measure: str) -> np.ndarray:
        return self.tables[table][1][measure]


@pytest.fixture
def sound() -> type[Healthy]:
    """Makes sound runs: `sound()`, or with other noise `sound(seed=1)`."""
    return Healthy


@pytest.fixture
def healthy(sound: type[Healthy]) -> Healthy:
    return sound()


@pytest.fixture(scope="session")
def checks() -> dict[str, Callable[[Recording], Finding]]:
    """The check of each finding, by its code: all together take a quarter of a second."""
    return {sys.modules[check.__module__].RULE.code: check for check in CHECKS}


@pytest.fixture
def finding(checks: dict[str, Any], record: Callable[..., Recording]) -> Callable[..., Finding]:
    """The finding of one check, by its code, for changed tables."""

    def find(code: str, run: Healthy, **settings: Any) -> Finding:
        settings = {"total_steps": 200, "steps_per_epoch": 100, **settings}
        status = settings.pop("status", "finished")
        found: Finding = checks[code](record(run.tables, settings, run.modules, status))
        return found

    return find


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recording]:
    """A real training of the packaged model under the lens, with validations; `change(model, step)` may break it."""
    from training_lens.config.compose import validate_values
    from training_lens.data.batching import iterate_batches
    from training_lens.display.progress import Progress
    from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss
    from training_lens.models.adapters import attach, base_only
    from training_lens.models.factory import load_model
    from training_lens.models.token_scores import supervised_scores
    from training_lens.training.loop.lr_schedule import lr_at
    from training_lens.training.plan import plan_run

    outputs = tmp_path_factory.mktemp("outputs")  # of all of them: the rows are tokenized once

    def run(
        lr: float = 3e-3,
        rows: int = 160,
        epochs: float = 1,
        evals: int = 2,
        change: Change = lambda _model, _step: None,
        **peft: Any,
    ) -> Recording:
        folder = tmp_path_factory.mktemp("run")
        config = validate_values({
            "data": {"max_examples": rows},
            "training": {"epochs": epochs, "batch_size": 4, "lr": lr},
            "peft": {"r": 8, **peft},
            "output": {"base_output_dir": str(outputs)},
        })  # fmt: skip
        plan = plan_run(config, Progress())
        torch.manual_seed(0)
        model = attach(load_model(plan.config.model, torch.device("cpu"), "fp32"), config.peft)
        assert plan.validation is not None
        held_out = plan.validation.select(np.arange(16))
        way = EvaluationOptions(plan.processes, "fp32", 4096, plan.tokenizer.eos_token_id)
        total, per_epoch = plan.schedule.total_steps, plan.schedule.steps_per_epoch
        facts = RunFacts(settings={"total_steps": total, "steps_per_epoch": per_epoch})
        change(model, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
        probe = Probe.from_dataset(plan.validation, 128, plan.tokenizer.eos_token_id)
        lens = TrainingLensFramework(folder / "lens", LensSection(spectra_every=10, probe_every=10), probe=probe)
        with lens.watch(model, optimizer, facts=facts):
            with base_only(model):
                lens.record_evaluation(0, evaluate_loss(model, held_out, way).loss, base=True)
            for step in plan.schedule.iterate_steps():
                optimizer.param_groups[0]["lr"] = lr_at(step.number, total, plan.config.training)
                loss = torch.zeros(())
                for batch in iterate_batches(plan.train, step.examples, 4096, 0):
                    nll = supervised_scores(model, batch.input_ids, batch.loss_mask).nll.sum()
                    (nll / int(plan.train.supervised_counts[step.examples].sum())).backward()
                    loss = loss + nll.detach() / int(plan.train.supervised_counts[step.examples].sum())
                norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
                optimizer.step()
                optimizer.zero_grad()
                change(model, step.number)
                lens.step(loss, lr=optimizer.param_groups[0]["lr"], clip=min(1.0, 1 / norm) if norm else 1.0)
                if step.number % max(1, total // evals) == 0:
                    lens.record_evaluation(step.number, evaluate_loss(model, held_out, way).loss)
        store = LensStore(folder / "lens")
        return Recording("run", folder, store.manifest, store, "finished")

    return run
