"""Small real models with adapters, and a loop that calls collectors as a capture does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import SIZES, tiny_model
from torch import Tensor

from training_lens.config.schema import PeftSection
from training_lens.core.collector import CaptureContext, DataCollector
from training_lens.core.modules import AdapterModule, ModuleBatches, adapter_modules
from training_lens.core.probe import Probe
from training_lens.core.types import Captured, Moment
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.model_classes import evaluation_mode
from training_lens.models.token_scores import paired_scores

VOCABULARY = SIZES["vocab_size"]


@pytest.fixture
def adapted() -> Callable[..., Any]:
    """Makes a small model with the adapter of a `peft` section; `moved` puts every trained parameter off its start."""

    def make(family: str = "Llama", moved: bool = True, **section: Any) -> Any:
        model = attach(tiny_model(family), PeftSection.model_validate({"r": 3, "lora_alpha": 5.0, **section}))
        for _, parameter in trainable_parameters(model) if moved else ():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def ids() -> Tensor:
    """Three rows of twelve tokens."""
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def probe(ids: Tensor) -> Probe:
    """The rows, two of them padded, with a prompt of three tokens."""
    lengths = torch.tensor([12, 7, 9])
    places = torch.arange(12)
    return Probe(ids, (places >= 3) & (places < lengths[:, None]), lengths)


@dataclass
class Loop:
    """Training by hand, as a capture watches it."""

    model: Any
    collectors: Sequence[DataCollector]
    optimizer: torch.optim.Optimizer | None = None
    probe: Probe | None = None
    context: CaptureContext = field(init=False)
    started: dict[str, Captured | None] = field(init=False)

    def __post_init__(self) -> None:
        modules = adapter_modules(self.model)
        self.context = CaptureContext(self.model, modules, ModuleBatches(modules), self.optimizer, self.probe)
        self.started = {c.name: c.start(self.context) for c in self.collectors}

    def step(self, ids: Tensor, clip: float | None = None) -> dict[str, Captured]:
        """One update on a batch, and what was captured of it."""
        assert self.optimizer is not None
        self.model(input_ids=ids, labels=ids).loss.backward()
        return self.update(clip)

    def update(self, clip: float | None = None) -> dict[str, Captured]:
        """An update with the gradients that stand."""
        context, optimizer = self.context, self.optimizer
        assert optimizer is not None
        context.before = [batch.copy_weights() for batch in context.batches]
        context.gradients = [batch.copy_gradients(lambda p: p.grad) for batch in context.batches]
        found = self._collected(Moment.GRADIENTS)
        if clip:
            torch.nn.utils.clip_grad_norm_([p for m in context.modules for p in m.trained_parameters], clip)
        optimizer.step()
        found |= self.look()
        optimizer.zero_grad()
        return found

    def look(self) -> dict[str, Captured]:
        """What collectors of updates see of the weights as they are."""
        self.context.after = [batch.copy_weights() for batch in self.context.batches]
        return self._collected(Moment.UPDATE)

    def go_through_probe(self) -> dict[str, Captured]:
        """The probe's two passes."""
        context, of = self.context, [c for c in self.collectors if c.moment is Moment.PROBE]
        assert context.probe is not None
        from contextlib import ExitStack

        with ExitStack() as around:
            around.enter_context(torch.no_grad())
            around.enter_context(evaluation_mode(self.model))
            for collector in of:
                around.enter_context(collector.probe_hooks(context))
            context.scores = paired_scores(self.model, context.probe.input_ids, context.probe.loss_mask)
        return self._collected(Moment.PROBE)

    def _collected(self, moment: Moment) -> dict[str, Captured]:
        of = [c for c in self.collectors if c.moment is moment]
        return {c.name: found for c in of if (found := c.collect(self.context, 1)) is not None}


@pytest.fixture
def loop() -> type[Loop]:
    """See `Loop`."""
    return Loop


@dataclass(frozen=True)
class Dense:
    """A module's matrices formed whole, in float64, without anything of the lens's measures."""

    module: AdapterModule

    @property
    def base(self) -> Tensor:
        """W (out, in)."""
        layer: Any = self.module.module
        weight = layer.get_base_layer().weight.detach().double()
        turned = layer.get_base_layer().__class__.__name__ in ("Conv1D", "Embedding")
        return weight.T if turned else weight

    @property
    def change(self) -> Tensor:
        """dW (out, in), as PEFT itself has it."""
        layer: Any = self.module.module
        adapter = self.module.record.adapter
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        else:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        change: Tensor = layer.scaling[adapter] * (b.detach().double() @ a.detach().double())
        return change


@pytest.fixture
def dense() -> Callable[[Loop], list[Dense]]:
    """The dense matrices of each watched module, in order."""
    return lambda loop: [Dense(module) for module in loop.context.modules]
