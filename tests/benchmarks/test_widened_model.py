"""The widened model of benchmarks/ computes what its source does, until noise is added to every matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_widening_keeps_the_logits_and_noise_reaches_every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from widened_model import EMPTY_LAYERS, WIDER, add_noise, widen_model  # type: ignore[import-not-found]

    source, ids = tiny_model(tie_word_embeddings=True), torch.arange(24).view(2, 12)
    wide = widen_model(source)
    assert wide.config.hidden_size == WIDER * source.config.hidden_size
    assert wide.config.num_hidden_layers == source.config.num_hidden_layers + sum(EMPTY_LAYERS)
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-5)
    before = {name: weight.clone() for name, weight in wide.named_parameters()}
    add_noise(wide, 0.1)
    moved = {name for name, weight in wide.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in before.items() if weight.ndim == 2}
