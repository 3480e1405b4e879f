"""No collector changes what training reads, and a run with all of them is stored and read."""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training_lens.collectors import ActivationExtractor, LoRAActivationTracker
from training_lens.core import table_names as tables
from training_lens.core.capture import RunFacts
from training_lens.core.collector import CollectorRegistry
from training_lens.core.framework import TrainingLensFramework
from training_lens.core.lens_store import LensStore
from training_lens.core.probe import Probe

OF_ROWS = {tables.ROW_LOSSES, tables.HELD_OUT_LOSSES}  # the trainer's, not a collector's
SECTIONS: list[dict[str, Any]] = [
    {"lora_dropout": 0.2},
    {"use_dora": True},
    {"init": "pissa"},
    {"family": "GPT2"},
    {"family": "Mixtral"},
    {"target_modules": ["embed_tokens", "q_proj"]},
]
OF_MIXTURES = {tables.ROUTER_LOAD}


def state(model: Any) -> dict[str, Any]:
    """All that training reads of a model and of torch."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    # PEFT's own forward pass registers the weight of experts anew, which counts as a write.
    written = [(n, p) for n, p in model.named_parameters() if ".experts." not in n or "lora_" in n]
    versions = {f"{n}.version": p._version for n, p in written}
    return {"tensors": tensors | gradients, "rest": (modes, hooks, needs, versions), "rng": torch.get_rng_state()}


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_no_collector_changes_what_training_reads(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, ids: Tensor, probe: Probe
) -> None:
    model = adapted(**section).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.get_input_embeddings().eval()  # a mode of its own
    of = loop(model, [], optimizer, probe)
    of.step(ids)
    model(input_ids=ids, labels=ids).loss.backward()
    context = of.context
    context.before = [batch.copy_weights() for batch in context.batches]
    context.gradients = [batch.copy_gradients(lambda p: p.grad) for batch in context.batches]
    optimizer.step()
    for name in CollectorRegistry.names():
        collector = CollectorRegistry.get(name)()
        of.collectors = [collector]
        before, moments = state(model), copy.deepcopy(optimizer.state_dict())
        collector.start(context)
        found = of._collected(collector.moment) if collector.moment == "gradients" else of.look()
        found |= of.go_through_probe() if collector.moment == "probe" else {}
        assert found or name in {tables.BASE, *OF_MIXTURES}
        after = state(model)
        assert all(torch.equal(after["tensors"][key], tensor) for key, tensor in before["tensors"].items())
        assert after["rest"] == before["rest"] and torch.equal(after["rng"], before["rng"]), name
        torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)


def test_every_table_has_the_measures_that_are_promised(
    adapted: Callable[..., Any], loop: Any, ids: Tensor, probe: Probe
) -> None:
    model = adapted(use_dora=True)
    made = [CollectorRegistry.get(name)() for name in CollectorRegistry.names()]
    of = loop(model, made, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), probe)
    found = {name: one for name, one in of.started.items() if one} | of.step(ids) | of.go_through_probe()
    promised = set(tables.MEASURES) - {tables.LOSS, tables.EVALUATION, *OF_ROWS, *OF_MIXTURES}
    assert {c.name for c in made} == promised | {tables.SNAPSHOTS, *OF_MIXTURES}
    for table in promised:
        assert {*found[table].scalars, *found[table].vectors} == set(tables.MEASURES[table]), table


def test_a_run_with_all_collectors_is_stored_and_read(
    adapted: Callable[..., Any], ids: Tensor, probe: Probe, tmp_path: Path
) -> None:
    model = adapted(moved=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    lens = TrainingLensFramework(tmp_path / "lens", probe=probe)
    with lens.watch(model, optimizer):
        for i in range(5):
            loss = model(input_ids=ids.roll(i), labels=ids.roll(i)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss)
    store = LensStore(tmp_path / "lens")
    assert {*tables.MEASURES} - {tables.EVALUATION, *OF_ROWS, *OF_MIXTURES} <= {*store.tables()}
    checks = store.series(tables.GRADIENTS, "self_check")
    assert checks.steps.tolist() == [1, 2, 3, 4, 5] and np.nanmax(checks.values) <= 1e-5
    moved = store.series(tables.WEIGHTS, "norm_step").values
    assert np.isfinite(moved).all() and (moved[1:] > 0).all()
    drifts = store.series(tables.ACTIVATIONS, "drift")
    assert drifts.steps[0] == 0 and not drifts.values[0].any() and drifts.values[-1].all()
    last = store.snapshot(tables.SNAPSHOTS, store.snapshot_steps(tables.SNAPSHOTS)[-1])
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(last[f"{name}.b"], layer.lora_B["default"].weight.detach())


def test_after_twenty_steps_scalars_keep_their_share_and_stay_exact(
    adapted: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    model, steps, total = adapted().train(), 32, 230  # at least every second step, to be 200 in the run
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    lens = TrainingLensFramework(tmp_path, collectors=[tables.GRADIENTS, tables.WEIGHTS])
    moved: list[float] = []  # of the first module, step by step
    with lens.watch(model, optimizer, facts=RunFacts(settings={"total_steps": total})):
        for i in range(steps):
            before = _change(model)
            loss = model(input_ids=ids.roll(i), labels=ids.roll(i)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss)
            moved.append(float((_change(model) - before).norm()))
    store = LensStore(tmp_path)
    captured = store.series(tables.WEIGHTS, "norm_step")
    assert captured.steps.tolist() == [*range(1, 21), *range(22, steps + 1, 2)]  # a capture is over 1 % of such steps
    assert store.series(tables.GRADIENTS, "self_check").steps.tolist() == captured.steps.tolist()
    np.testing.assert_allclose(captured.values[:, 0], np.array(moved)[captured.steps - 1], rtol=1e-4)
    assert store.series(tables.GRADIENTS, "self_check").values.max() <= 1e-5
    assert len(store.series(tables.LOSS, "loss").steps) == steps


def _change(model: Any) -> Tensor:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    change: Tensor = layer.scaling["default"] * (b @ a)
    return change


@pytest.mark.parametrize("section", [{}, {"family": "GPT2"}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_before_the_first_step_one_probe_pass_equals_two(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, probe: Probe, tmp_path: Path
) -> None:
    model = adapted(moved=False, **section)
    made = [CollectorRegistry.get(name)() for name in CollectorRegistry.names()]
    wanted = loop(model, made, probe=probe).go_through_probe()  # two passes
    passes: list[bool] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(True))
    lens = TrainingLensFramework(tmp_path, probe=probe)
    lens.start(model)
    handle.remove()
    lens.stop()
    assert len(passes) == 1 and len(wanted) == 3
    store = LensStore(tmp_path)
    for table, captured in wanted.items():
        for measure, values in captured.scalars.items():
            series = store.series(table, measure)
            at = [series.names.index(row) for row in captured.rows]
            np.testing.assert_array_equal(series.values[0, at], values.float().numpy(), err_msg=f"{table}.{measure}")


def test_a_resumed_run_has_its_frozen_weights_once(adapted: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    model = adapted()
    for after in (0, 1):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        lens = TrainingLensFramework(tmp_path)
        with lens.watch(model, optimizer, facts=RunFacts(after_step=after)):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss)
    store = LensStore(tmp_path)
    assert store.table(tables.BASE).num_rows == 14
    assert store.series(tables.WEIGHTS, "norm_a").steps.tolist() == [1, 2]


@pytest.mark.parametrize("shown", [ActivationExtractor, LoRAActivationTracker])
def test_examples_run(
    shown: type, adapted: Callable[..., Any], ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"model": adapted(), "batches": [{"input_ids": ids}], "torch": torch, shown.__name__: shown}
    names["tokenizer"] = lambda text: {"input_ids": [ord(character) % 97 for character in text]}
    exec(textwrap.dedent(str(shown.__doc__).split("Example:\n")[1]), names)
    printed = ast.literal_eval(capsys.readouterr().out)
    assert printed and all(value > 0 for value in printed.values())
