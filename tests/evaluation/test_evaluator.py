"""Losses equal a naive float64 computation over full logits, however the set is cut and memory runs out."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.config.data_sections import DataSection
from training_lens.config.schema import ModelSection
from training_lens.data.source_reader import read_examples
from training_lens.data.templates import build_renderer
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import Preparation, tokenize
from training_lens.data.tokenization import TextEncoder
from training_lens.errors import EvaluationError
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss, paired_sums, token_sums
from training_lens.models.factory import load_model
from training_lens.utils.processes import Processes

CPU = torch.device("cpu")


def way(max_tokens: int = 4096) -> EvaluationOptions:
    return EvaluationOptions(Processes(CPU), "fp32", max_tokens, fill_id=0)


@pytest.fixture(scope="module")
def dataset(embedded_tokenizer: Any) -> TokenDataset:
    examples = list(read_examples(["embedded:heldout"], "data.validation", DataSection()))[:20]
    renderer = build_renderer(DataSection(), embedded_tokenizer)
    preparation = Preparation(DataSection(), renderer, TextEncoder(embedded_tokenizer), 512, "")
    tokenized = tokenize(examples, preparation)
    return TokenDataset.from_examples([t for t in tokenized if t is not None])


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(ModelSection(), CPU, "fp32")


def naive(model: Any, dataset: TokenDataset) -> np.ndarray:
    """(examples, 2) loss and correct tokens, from the full logits in float64."""
    sums = np.zeros((len(dataset), 2))
    for row, e in enumerate(dataset):
        ids = torch.from_numpy(e.input_ids.astype("int64"))[None]
        with torch.inference_mode():
            logs = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
        for place in range(1, len(e.input_ids)):
            if e.loss_mask[place]:
                sums[row] += (-logs[place - 1, ids[0, place]].item(), logs[place - 1].argmax() == ids[0, place])
    return sums


@pytest.mark.parametrize("max_tokens", [1, 500, 10**6])
def test_equals_the_naive_sums_of_each_example(model: Any, dataset: TokenDataset, max_tokens: int) -> None:
    sums, wanted = token_sums(model, dataset, way(max_tokens)), naive(model, dataset)
    np.testing.assert_allclose(sums.nll, wanted[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(sums.correct, wanted[:, 1])
    np.testing.assert_array_equal(sums.tokens, dataset.supervised_counts)


def test_the_loss_is_the_mean_whole_and_by_domain(model: Any, dataset: TokenDataset) -> None:
    report, wanted = evaluate_loss(model, dataset, way()), naive(model, dataset)[:, 0]
    assert report.loss == pytest.approx(wanted.sum() / dataset.supervised_counts.sum(), rel=1e-5)
    assert report.supervised_tokens == dataset.supervised_counts.sum()
    for domain, loss in report.by_domain.items():
        rows = dataset.domains == domain
        assert loss == pytest.approx(wanted[rows].sum() / dataset.supervised_counts[rows].sum(), rel=1e-5)
    assert len(report.by_domain) > 1 and report.by_file == {}


def test_training_mode_is_put_back(dataset: TokenDataset) -> None:
    model = load_model(ModelSection(), CPU, "fp32").train()
    evaluate_loss(model, dataset, way())
    assert model.training


class LittleMemory:
    """A decoder that has room for so many tokens at once: beyond that it fails as torch does."""

    def __init__(self, model: Any, room: int) -> None:
        self.room, self.most = room, 0
        self.handle = model.get_decoder().register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("input_ids") is None:
            return
        tokens = kwargs["input_ids"].numel()
        if tokens > self.room:
            raise torch.OutOfMemoryError("out of memory, as planned")
        self.most = max(self.most, tokens)


def test_batches_halve_where_memory_runs_out_and_nothing_is_lost(
    model: Any, dataset: TokenDataset, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = token_sums(model, dataset, way())
    memory = LittleMemory(model, room=300)
    try:
        with caplog.at_level(logging.WARNING, "training_lens"):
            found = token_sums(model, dataset, way(10**6))
    finally:
        memory.handle.remove()
    np.testing.assert_allclose(found.nll, wanted.nll, rtol=1e-5)
    assert memory.most <= 300 and "out of memory in a batch of" in caplog.text


def test_one_example_that_does_not_fit_is_an_error_that_says_so(model: Any, dataset: TokenDataset) -> None:
    memory = LittleMemory(model, room=10)
    try:
        with pytest.raises(EvaluationError, match="out of memory, as planned"):
            token_sums(model, dataset, way())
    finally:
        memory.handle.remove()


def test_base_and_adapter_in_one_pass_are_those_of_two(finished_run: Any, dataset: TokenDataset) -> None:
    from training_lens.inference.session import open_run

    adapted = open_run(finished_run).model
    pair, adapter = paired_sums(adapted, dataset, way(500)), token_sums(adapted, dataset, way(500))
    with adapted.disable_adapter():
        base = token_sums(adapted, dataset, way(500))
    np.testing.assert_array_equal(pair.base.nll, base.nll)
    np.testing.assert_array_equal(pair.adapter.nll, adapter.nll)
    assert (pair.kl > 0).all() and math.isfinite(pair.kl.sum())
