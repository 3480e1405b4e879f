"""Layers' outputs on the probe set are those of the model with and without its adapter, at real tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from training_lens.collectors import ActivationExtractor, ActivationsCollector, DivergenceCollector
from training_lens.collectors.layer_activations import MAX_POSITIONS, TokenPositions, decoder_layers
from training_lens.core.probe import Probe
from training_lens.errors import LensError
from training_lens.models.adapters import base_only
from training_lens.models.model_classes import evaluation_mode


def hidden_states(model: Any, probe: Probe) -> list[Tensor]:
    """transformers' own record of the layers' outputs at real tokens; without the last, which it gives normed."""
    with torch.no_grad():
        states = model.eval()(input_ids=probe.input_ids, output_hidden_states=True).hidden_states
    return [h[probe.attention_mask].double() for h in states[1:-1]]


@pytest.mark.parametrize("section", [{}, {"family": "GPT2"}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_every_measure_is_that_of_the_models_own_hidden_states(
    section: dict[str, Any], adapted: Callable[..., Any], loop: Any, probe: Probe
) -> None:
    model = adapted(**section)
    captured = loop(model, [ActivationsCollector()], probe=probe).go_through_probe()["activations"]
    found, adapter = captured.scalars, hidden_states(model, probe)
    with base_only(model):
        base = hidden_states(model, probe)
    assert captured.rows == ["layers.0", "layers.1"] and len(adapter) == 1
    for i, (h, h0) in enumerate(zip(adapter, base, strict=True)):
        wanted = {"mean": h.mean(), "rms": h.square().mean().sqrt(), "drift": (h - h0).norm() / h0.norm()}
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][i].double(), value, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found["cka"][i], _cka(h, h0), rtol=1e-4, atol=1e-7)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA, by the sums of Song et al. 2012."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        ones = torch.ones(n, dtype=k.dtype)
        first = (k @ m).trace() + ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (first - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


def test_a_fresh_adapter_is_the_base(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    found = loop(adapted(moved=False), [ActivationsCollector(), DivergenceCollector()], probe=probe).go_through_probe()
    layers, divergence = found["activations"].scalars, found["divergence"].scalars
    assert torch.equal(layers["drift"], torch.zeros(2)) and torch.equal(divergence["kl"], torch.zeros(1))
    torch.testing.assert_close(layers["cka"], torch.ones(2).double(), rtol=0, atol=1e-12)
    assert torch.equal(divergence["loss"], divergence["base_loss"]) and float(divergence["tokens"]) == 9 + 4 + 6


def test_divergence_is_the_mean_over_supervised_tokens(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    model = adapted()
    found = loop(model, [DivergenceCollector()], probe=probe).go_through_probe()["divergence"].scalars
    predicting = probe.loss_mask.roll(-1, 1)
    predicting[:, -1] = False
    with torch.no_grad():
        q = model(input_ids=probe.input_ids).logits[predicting].double().log_softmax(-1)
        with base_only(model):
            p = model(input_ids=probe.input_ids).logits[predicting].double().log_softmax(-1)
    targets = probe.input_ids.roll(-1, 1)[predicting][:, None]
    wanted = {"kl": (p.exp() * (p - q)).sum(-1), "loss": -q.gather(1, targets), "base_loss": -p.gather(1, targets)}
    for name, values in wanted.items():
        torch.testing.assert_close(found[name][0].double(), values.mean(), rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    model = adapted()
    other = Probe(probe.input_ids.clone(), probe.loss_mask, probe.lengths)
    other.input_ids[~probe.attention_mask] = 7
    first, second = (
        loop(model, [ActivationsCollector()], probe=p).go_through_probe()["activations"] for p in (probe, other)
    )
    assert all(torch.equal(first.scalars[name], second.scalars[name]) for name in first.scalars)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_sketches_stay_comparable(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    """The same tokens and the same projection whenever they are taken: distances of states are nearly kept."""
    model = adapted()
    one, two = (loop(model, [ActivationsCollector()], probe=probe).go_through_probe()["activations"] for _ in range(2))
    assert one.tensors["layers.1.sketch"].shape == (28, 16)
    assert torch.equal(one.tensors["layers.1.sketch"], two.tensors["layers.1.sketch"])
    assert torch.equal(one.tensors["positions"], probe.attention_mask.flatten().nonzero()[:, 0])
    state = ActivationExtractor(model).extract(probe).adapter[1].float()
    ratio = one.tensors["layers.1.sketch"].norm() / state.norm()
    assert 0.5 < float(ratio) < 2


def test_positions_are_real_bounded_and_evenly_spread() -> None:
    real = torch.arange(400)[None] < torch.tensor([[400], [100], [0], [333]])
    positions = TokenPositions.from_mask(real)
    states = torch.arange(1600.0).reshape(4, 400, 1)
    chosen = positions.select_states(states)[:, 0]
    assert len(chosen) == MAX_POSITIONS and real.flatten()[chosen.long()].all()
    gaps = real.flatten().cumsum(0)[chosen.long()].diff()
    assert set(gaps.tolist()) == {833 // MAX_POSITIONS, 833 // MAX_POSITIONS + 1}
    assert torch.equal(positions.select_states(states.flatten(0, 1)), positions.select_states(states))
    assert torch.equal(positions.select_ids(states[..., 0].long()), chosen.long())
    assert positions.select_states(torch.zeros(5, 3)).shape == (5, 3)


def test_the_extractor_takes_texts_batches_and_probes(
    adapted: Callable[..., Any], probe: Probe, embedded_tokenizer: Any
) -> None:
    model = adapted()
    batch = {
        "input_ids": probe.input_ids.tolist(),
        "attention_mask": probe.attention_mask.long().tolist(),
    }
    of_probe, of_batch = (ActivationExtractor(model).extract(x) for x in (probe, batch))
    for one, two in zip(of_probe.adapter, of_batch.adapter, strict=True):
        torch.testing.assert_close(one, two)
    assert of_probe.names == ["layers.0", "layers.1"]
    wanted = hidden_states(model, probe)[0]
    torch.testing.assert_close(of_probe.adapter[0].double(), wanted, rtol=1e-4, atol=1e-6)
    assert (of_probe.measures()["drift"] > 0).all()

    def tokenize(text: str) -> dict[str, list[int]]:
        return {"input_ids": [i % 97 for i in embedded_tokenizer(text)["input_ids"]]}

    texts = ActivationExtractor(model, tokenize).extract(["The cat sat.", "A dog ran home."])
    assert len(texts.base[0]) == sum(len(tokenize(t)["input_ids"]) for t in ("The cat sat.", "A dog ran home."))
    with pytest.raises(LensError, match="texts need a tokenizer"):
        ActivationExtractor(model).extract(["The cat sat."])


def test_without_an_adapter_both_are_the_base(probe: Probe) -> None:
    states = ActivationExtractor(tiny_model()).extract(probe)
    assert all(torch.equal(h, h0) for h, h0 in zip(states.adapter, states.base, strict=True))


def test_layers_are_found_in_other_families(adapted: Callable[..., Any]) -> None:
    for family in ("Llama", "GPT2"):
        assert len(decoder_layers(adapted(family))) == 2


def test_a_decoder_without_layers_is_refused() -> None:
    model = tiny_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(LensError, match=r"no list of layers in the decoder of this LlamaForCausalLM.*Leave out"):
        decoder_layers(model)


def test_bfloat16_is_measured(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    found = loop(adapted().to(torch.bfloat16), [ActivationsCollector()], probe=probe).go_through_probe()["activations"]
    assert all(values.isfinite().all() for values in found.scalars.values())
    assert {found.tensors[f"layers.{i}.sketch"].dtype for i in range(2)} == {torch.float32}


def test_nan_in_a_layer_is_captured(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    model = adapted()
    of = loop(model, [ActivationsCollector()], probe=probe)
    of.context.modules[-1].b.data[0, 0] = torch.nan  # in the last layer
    found = of.go_through_probe()["activations"].scalars
    for values in found.values():
        assert values.isnan().tolist() == [False, True]


def test_the_block_leaves_no_hook(adapted: Callable[..., Any], loop: Any, probe: Probe) -> None:
    model = adapted()
    of = loop(model, [ActivationsCollector()], probe=probe)
    collector = of.collectors[0]
    with evaluation_mode(model), pytest.raises(RuntimeError, match="broken off"), collector.probe_hooks(of.context):
        raise RuntimeError("broken off")
    assert not any(module._forward_hooks for module in model.modules())
