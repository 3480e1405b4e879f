"""Scores of rows against what small steps do: gradients by finite differences, and the closed forms of TracIn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from training_lens.analysis.explanations.influence import (
    PassOptions,
    read_gradient,
    read_packed_gradients,
    score_by_gradients,
)
from training_lens.config.schema import PeftSection
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.fast.engine import Engine

RATE, BATCH = 1e-3, 4


def build_text(number: int, length: int = 12, supervised: bool = True) -> TokenizedExample:
    generator = np.random.default_rng(number)
    mask = np.zeros(length, dtype=bool)
    mask[length // 2 :] = supervised
    return TokenizedExample("rows", number, generator.integers(3, 90, length).astype(np.int32), mask, None, number)


@pytest.fixture
def engine() -> Engine:
    """A tiny model with an adapter that is no longer the base, all in float64: Llama's norms would round to float32."""
    model = attach(tiny_model("GPT2", initializer_range=0.3), PeftSection(r=2, lora_alpha=4)).double()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return Engine(model)


def read_weights(engine: Engine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for _, parameter in trainable_parameters(engine.model)])


def write_weights(engine: Engine, values: Tensor) -> None:
    parameters = [parameter for _, parameter in trainable_parameters(engine.model)]
    with torch.no_grad():
        for parameter, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def measure_loss(engine: Engine, text: TokenizedExample) -> float:
    """The mean loss of the supervised tokens, from the model's own logits (whose loss transformers rounds)."""
    ids = torch.from_numpy(text.input_ids.astype(np.int64))
    with torch.no_grad():
        scores = engine.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)  # (length - 1, vocabulary)
    assert scores.dtype == torch.float64
    of_tokens = scores.gather(1, ids[1:, None])[:, 0]
    return -float(of_tokens[torch.from_numpy(text.loss_mask[1:])].mean())


def take_sgd_steps(engine: Engine, steps: Sequence[Sequence[int]], rate: float, row: int, weight: float) -> None:
    """Plain SGD on batches of texts, the mean of their losses, with one row's loss times `weight`."""
    for batch in steps:
        gradients = [read_gradient(engine, build_text(i), "fp32") * (weight if i == row else 1.0) for i in batch]
        write_weights(engine, read_weights(engine) - rate / len(batch) * torch.stack(gradients).sum(0))


def test_a_gradient_is_the_change_of_the_loss(engine: Engine) -> None:
    text, start = build_text(1), read_weights(engine)
    gradient = read_gradient(engine, text, "fp32")
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = []
    for step in (1e-6, -1e-6):
        write_weights(engine, start + step * direction)
        losses.append(measure_loss(engine, text))
    assert gradient.dtype == torch.float64
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-6)


def test_one_sgd_step_changes_a_query_by_the_product_of_gradients(engine: Engine) -> None:
    """To first order in the rate: -rate <g(query), g(row)> / batch, by central differences."""
    query, row, start = build_text(100), 1, read_weights(engine)
    product = float(read_gradient(engine, query, "fp32") @ read_gradient(engine, build_text(row), "fp32"))
    losses = []
    for rate in (RATE, -RATE):
        write_weights(engine, start)
        write_weights(engine, start - rate / BATCH * read_gradient(engine, build_text(row), "fp32"))
        losses.append(measure_loss(engine, query))
    assert (losses[0] - losses[1]) / 2 == pytest.approx(-RATE * product / BATCH, rel=1e-4)


def test_k_sgd_steps_approach_the_sum_of_products_as_the_rate_falls(engine: Engine) -> None:
    """Replays with a row's weight 1 + e and 1 - e, against TracIn's sum: the error falls with the rate."""
    query, row, start, epsilon = build_text(100), 1, read_weights(engine), 1e-4
    steps = [(0, 1, 2, 3), (4, 5, 6, 7), (1, 8, 9, 2)]
    errors = []
    for rate in (4e-2, 1e-2):
        predicted, measured = 0.0, []
        write_weights(engine, start)
        for batch in steps:
            if row in batch:
                products = read_gradient(engine, query, "fp32") @ read_gradient(engine, build_text(row), "fp32")
                predicted -= rate / len(batch) * float(products)
            take_sgd_steps(engine, [batch], rate, row, 1.0)
        for weight in (1 + epsilon, 1 - epsilon):
            write_weights(engine, start)
            take_sgd_steps(engine, steps, rate, row, weight)
            measured.append(measure_loss(engine, query))
        truth = (measured[0] - measured[1]) / (2 * epsilon)
        errors.append(abs(predicted - truth) / abs(truth))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.1, errors


def test_scores_are_cosines_and_a_masked_row_scores_0(engine: Engine) -> None:
    rows = TokenDataset.from_examples([build_text(1), build_text(2, 30), build_text(3, supervised=False)])
    queries = TokenDataset.from_examples([build_text(1), build_text(7)])
    found = score_by_gradients(engine, rows, queries, PassOptions(), lambda gradient: gradient)
    one, two = read_gradient(engine, build_text(7), "fp32"), read_gradient(engine, build_text(2, 30), "fp32")
    assert found[0, 0] == pytest.approx(1.0) and found[0, 2] == found[1, 2] == 0
    assert found[1, 1] == pytest.approx(float(one @ two / (one.norm() * two.norm())))


@pytest.mark.parametrize("use_dora", [False, True])
def test_packed_texts_have_the_gradients_that_they_have_alone(use_dora: bool) -> None:
    """One pass gives each text's; of DoRA, whose magnitudes are no factors, single passes do."""
    model = attach(tiny_model(), PeftSection(r=2, lora_alpha=4, use_dora=use_dora))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    engine = Engine(model)
    assert engine.can_pack
    texts = [build_text(1), build_text(2, 30), build_text(3, supervised=False), build_text(4, 7)]
    alone = torch.stack([read_gradient(engine, text, "fp32") for text in texts])
    packed = read_packed_gradients(engine, texts, "fp32")
    assert (packed is None) == use_dora
    if packed is not None:
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)
        assert not any(parameter.grad is not None for parameter in model.parameters())
    rows = TokenDataset.from_examples(texts)
    one, many = (score_by_gradients(engine, rows, rows, PassOptions(tokens=n), lambda g: g) for n in (1, 50))
    np.testing.assert_allclose(many, one, atol=1e-5)
    first_alone = score_by_gradients(engine, rows, rows, PassOptions(tokens=20), lambda g: g)
    np.testing.assert_allclose(first_alone, one, atol=1e-5)
