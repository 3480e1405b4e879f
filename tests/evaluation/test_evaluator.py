"""The loss equals a naive computation over full logits, however the set is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training_lens.config.schema import DataSection, ModelSection
from training_lens.data.preparation import Preparation, read_examples, tokenize
from training_lens.data.store import TokenDataset
from training_lens.data.templates import build_renderer
from training_lens.data.tokenization import TextEncoder
from training_lens.evaluation.evaluator import evaluate_loss
from training_lens.models.factory import load_model
from training_lens.utils.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(embedded_tokenizer: Any) -> TokenDataset:
    examples = list(read_examples(["embedded:heldout"], "data.validation", DataSection()))[:20]
    renderer = build_renderer(DataSection(), embedded_tokenizer)
    preparation = Preparation(DataSection(), renderer, TextEncoder(embedded_tokenizer), 512, "")
    tokenized = tokenize(examples, preparation)
    return TokenDataset.of([t for t in tokenized if t is not None])


def naive(model: Any, dataset: TokenDataset, domain: str | None = None) -> float:
    total, tokens = 0.0, 0
    for e in dataset:
        if domain is not None and e.domain != domain:
            continue
        ids = torch.from_numpy(e.input_ids.astype("int64"))[None]
        with torch.inference_mode():
            logs = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
        for place in range(1, len(e.input_ids)):
            if e.loss_mask[place]:
                total, tokens = total - logs[place - 1, ids[0, place]].item(), tokens + 1
    return total / tokens


@pytest.mark.parametrize("max_tokens", [1, 500, 10**6])
def test_equals_the_naive_loss_whole_and_by_domain(dataset: TokenDataset, max_tokens: int) -> None:
    model = load_model(ModelSection(), CPU, "fp32")
    report = evaluate_loss(model, dataset, Processes(CPU), "fp32", max_tokens, fill_id=0)
    assert report.loss == pytest.approx(naive(model, dataset), rel=1e-5)
    assert report.supervised_tokens == dataset.supervised.sum()
    for domain, loss in report.by_domain.items():
        assert loss == pytest.approx(naive(model, dataset, domain), rel=1e-5)


def test_training_mode_is_put_back(dataset: TokenDataset) -> None:
    model = load_model(ModelSection(), CPU, "fp32").train()
    evaluate_loss(model, dataset, Processes(CPU), "fp32", 4096, fill_id=0)
    assert model.training
