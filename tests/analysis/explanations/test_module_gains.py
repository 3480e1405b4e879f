"""Where the gain lives, on a real run: sums, known answers, a smaller adapter, and the page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from training_lens.analysis.explanations.drop_modules import resolve_modules, write_without_modules
from training_lens.analysis.explanations.explained_adapter import ExplainedAdapter
from training_lens.analysis.explanations.loss_path import LossPath
from training_lens.analysis.explanations.module_gains import DropTest, ModuleGains, choose_drop
from training_lens.analysis.explanations.module_gains_report import (
    build_module_report,
    describe_check,
    describe_modules,
    module_table,
    target_expression,
)
from training_lens.analysis.explanations.module_measurement import measure_modules
from training_lens.analysis.run_reader import Run
from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, CheckpointError, ConfigurationError

ROWS = RowOptions(max_examples=8)
FEW = EvaluationSection(resamples=100, length_buckets=2)


@pytest.fixture(scope="module")
def gains(finished_run: Any) -> ModuleGains:
    found: ModuleGains = Run(finished_run.root).explain.modules(ROWS, FEW)
    return found


def test_shares_sum_to_the_change_in_every_grouping(gains: ModuleGains) -> None:
    assert gains.is_complete and gains.residual <= 0.01 and gains.points == 8
    total = sum(module.share for module in gains.modules)
    assert total == pytest.approx(gains.change, rel=0.01)
    assert gains.change == pytest.approx(gains.loss - gains.base_loss)
    for groups in (gains.by_layer, gains.by_kind):
        assert sum(group.share for group in groups) == pytest.approx(total)
        assert sum(group.fraction or 0 for group in groups) == pytest.approx(1)
    for by in ("domain", "length"):
        parts = [group for group in gains.by_rows if group.by == by]
        tokens = np.array([group.supervised_tokens for group in parts])
        assert len(parts) > 1 and tokens.sum() == gains.supervised_tokens
        assert tokens @ [group.change for group in parts] / tokens.sum() == pytest.approx(gains.change)
        for shares in ([list(group.by_layer.values()) for group in parts], [list(g.by_kind.values()) for g in parts]):
            assert tokens @ np.array(shares).sum(1) / tokens.sum() == pytest.approx(total)


def test_layers_are_tested_off_and_alone(gains: ModuleGains) -> None:
    assert [layer.name for layer in gains.layers] == [group.name for group in gains.by_layer]
    for layer in gains.layers:
        assert layer.interaction == pytest.approx(layer.off + layer.alone)
        assert layer.off_interval and layer.off_interval[0] <= layer.off <= layer.off_interval[1]
    sizes = [len(drop.dropped) for drop in gains.drops]
    assert sizes == sorted(sizes) and sizes[0] > 0 and sizes[-1] < len(gains.modules)
    least = max(gains.modules, key=lambda module: module.share)
    assert all(least.name in drop.dropped for drop in gains.drops)


@pytest.mark.slow
def test_the_cost_is_said_before_and_is_what_is_made(finished_run: Any) -> None:
    lines: list[str] = []
    session, rows = open_rows(finished_run, RowOptions(max_examples=2))
    found = measure_modules(session, rows, FEW, announce=lines.append)
    assert lines == [
        f"8 to 56 forward and backward passes and {found.passes} forward passes over {found.tokens} tokens"
    ]


@pytest.mark.slow
def test_micro_batches_do_not_change_the_gradients(finished_run: Any) -> None:
    session, rows = open_rows(finished_run, RowOptions(max_examples=6))
    path = LossPath(session, rows.dataset, 4096, Progress())
    change = path.measure_losses([1.0] * len(path.multipliers.names), "") - path.measure_losses(
        [0.0] * len(path.multipliers.names), ""
    )
    whole = path.share_change(change, (4,)).by_row
    path._gradient_tokens = 1
    assert np.allclose(path.share_change(change, (4,)).by_row, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_single_module_that_is_not_zero_has_all_of_the_gain(own_run: Any) -> None:
    """Planted: all factors B but one are 0 in the run's files."""
    file = own_run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    (kept,) = [name for name in tensors if "layers.1." in name and "down_proj.lora_B" in name]
    change_files(own_run, {n: t if "lora_B" not in n or n == kept else t * 0 for n, t in tensors.items()})
    found = Run(own_run.root).explain.modules(ROWS, FEW)
    (full,) = [module for module in found.modules if module.share]
    assert f"{full.name}.lora_B" in kept and full.fraction == pytest.approx(1, abs=0.01)
    (layer,) = [layer for layer in found.layers if layer.share]
    assert layer.off == pytest.approx(-found.change) and layer.alone == pytest.approx(found.change)
    # An adapter of zeros changes nothing, and nothing is shared out.
    change_files(own_run, {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    nothing = Run(own_run.root).explain.modules(ROWS, FEW)
    assert nothing.change == 0 and nothing.residual == 0 and not any(module.share for module in nothing.modules)
    assert nothing.offered is None and "nothing to share out" in " ".join(describe_modules(nothing))


def change_files(run: Any, tensors: dict[str, Any]) -> None:
    """Other weights in a run's adapter, without the recorded hashes of the old ones."""
    save_file(tensors, run.adapter / "adapter_model.safetensors", {"format": "pt"})
    (run.metadata / "hashes.json").unlink(missing_ok=True)


def test_the_adapter_without_modules_answers_with_the_loss_that_was_measured(
    finished_run: Any, gains: ModuleGains, tmp_path: Path
) -> None:
    drop = gains.drops[1]
    adapter = ExplainedAdapter.from_run(finished_run, ROWS)
    written = write_without_modules(adapter, tmp_path / "small", list(drop.dropped), FEW)
    assert written.loss == pytest.approx(drop.loss, abs=1e-5) and written.whole_loss == pytest.approx(gains.loss)
    assert written.parameters == drop.parameters < gains.parameters
    settings = json.loads((tmp_path / "small/adapter_config.json").read_text())
    kept = {module.name for module in gains.modules} - set(drop.dropped)
    assert all(any(path == n or path.endswith(f".{n}") for n in settings["target_modules"]) for path in kept)
    expression = re.compile(target_expression(gains, drop))
    assert {module.name for module in gains.modules if expression.fullmatch(module.name)} == kept


def test_names_mean_paths_endings_and_beginnings() -> None:
    adapted = ["model.layers.1.q_proj", "model.layers.1.up_proj", "model.layers.11.q_proj", "lm_head"]
    assert resolve_modules(["q_proj"], adapted) == ("model.layers.1.q_proj", "model.layers.11.q_proj")
    assert resolve_modules(["model.layers.1", "lm_head"], adapted) == (*adapted[:2], "lm_head")
    with pytest.raises(ConfigurationError, match=r"--drop up_prj: .*Did you mean 'up_proj'"):
        resolve_modules(["up_prj"], adapted)
    with pytest.raises(ConfigurationError, match="nothing of the adapter would be left"):
        resolve_modules(["model.layers.1", "model.layers.11", "lm_head"], adapted)


def test_the_largest_surely_harmless_drop_is_offered() -> None:
    drops = [
        DropTest("2", ("a",) * 2, 8, 1.0, 0.001, (0.0, 0.002)),
        DropTest("4", ("a",) * 4, 6, 1.0, 0.004, (0.001, 0.009)),
        DropTest("8", ("a",) * 8, 2, 1.1, 0.008, (0.002, 0.02)),
    ]
    assert choose_drop(drops, (-1.0, (-1.2, -0.8)))[0] == "4"
    assert choose_drop(drops, (-0.1, (-0.2, -0.05)))[0] is None
    label, reason = choose_drop(drops, (-1.0, (-2.0, 0.1)))
    assert label is None and "do not show" in reason


def test_shares_that_are_not_complete_are_inconclusive(gains: ModuleGains) -> None:
    rough = replace(gains, residual=0.05, is_complete=False, points=32)
    assert describe_check(rough).startswith("inconclusive") and describe_check(gains).startswith("complete")
    assert not any("largest shares" in line for line in describe_modules(rough))


def test_the_report_has_every_module_in_every_form(gains: ModuleGains, tmp_path: Path) -> None:
    hostile = replace(gains.modules[0], name="<script>alert(1)</script>")
    shown = replace(gains, modules=(hostile, *gains.modules[1:]))
    build_module_report(shown).write_all(tmp_path, "explain-modules", module_table(shown))
    assert len(json.loads((tmp_path / "explain-modules.json").read_text())["modules"]) == len(gains.modules)
    assert len((tmp_path / "explain-modules.csv").read_text().splitlines()) == len(gains.modules) + 1
    page = (tmp_path / "explain-modules.html").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and gains.modules[-1].name in page
    assert gains.modules[-1].name in (tmp_path / "explain-modules.md").read_text()


def test_an_unfinished_run_and_a_broken_adapter_are_refused(own_run: Any) -> None:
    tensors = load_file(own_run.adapter / "adapter_model.safetensors")
    change_files(own_run, {name: tensor * float("nan") for name, tensor in tensors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        Run(own_run.root).explain.modules(ROWS, FEW)
    shutil.rmtree(own_run.adapter)
    with pytest.raises(CheckpointError, match="adapter"):
        Run(own_run.root).explain.modules(ROWS, FEW)
