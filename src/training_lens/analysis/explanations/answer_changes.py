"""Why one answer changed, as values: its tokens, its layers, its modules, and the training rows that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from training_lens.data.examples import TokenizedExample

AnswerSource = Literal["greedy", "given", "row"]  # the adapter's own, `--answer`, or the row's


@dataclass(frozen=True)
class TokenChange:
    """One token of the answer: its log-probability in nats under base and adapter, given the same tokens before it.

    `base_top` and `adapter_top` are the tokens that each model holds likeliest there; `kl` is KL(base || adapter).
    """

    id: int
    text: str
    base_logp: float
    adapter_logp: float
    change: float  # adapter less base
    base_top: str
    adapter_top: str
    kl: float


@dataclass(frozen=True)
class LayerChange:
    """A layer's logit lens: KL(base || adapter) over the answer (mean) and at the chosen token, nats.

    The log-probabilities are the lenses' of the chosen token.
    """

    layer: int
    kl: float
    token_kl: float
    base_logp: float
    adapter_logp: float


@dataclass(frozen=True)
class LayerComparison:
    """All layers, and the first from which on the mean KL stays above half of the last one's; None: there is none."""

    layers: tuple[LayerChange, ...]
    parts_at: int | None


@dataclass(frozen=True)
class ModuleEffect:
    """A module's share of a change of the loss -log p, in nats; below 0 it makes the tokens likelier."""

    name: str
    layer_name: str
    kind: str
    share: float
    fraction: float | None


@dataclass(frozen=True)
class TokenModules:
    """The change of -log p of one token (`token`, from 0) or of the whole answer (None), shared out among modules."""

    token: int | None
    change: float
    points: int
    residual: float
    is_complete: bool
    modules: tuple[ModuleEffect, ...]


@dataclass(frozen=True)
class AnswerChange:
    """What the adapter changed about one answer to one prompt.

    `tokens` are those of `answer`, teacher-forced under both models; `base_answer` and `adapter_answer` are what each
    says by itself (greedy), `cut` names those that reached the limit of tokens. `token` is the one that is looked at.
    `layers` is None where the model has no lens, with a note. `rows` are the training rows that made it, ranked; None
    where they were not asked for.
    """

    run: str
    prompt: str
    row: str | None
    domain: str | None
    answer: str
    source: AnswerSource
    base_answer: str
    adapter_answer: str
    cut: tuple[str, ...]
    tokens: tuple[TokenChange, ...]
    token: int
    layers: LayerComparison | None
    at_token: TokenModules
    whole: TokenModules
    notes: tuple[str, ...]
    passes: int
    gradient_passes: int
    length: int  # tokens of prompt and answer, read in every pass
    ids: tuple[int, ...]  # of prompt and answer
    places: tuple[int, ...]  # of the answer's tokens in `ids`
    rows: Mapping[str, Any] | None = None

    @property
    def supervised_answer(self) -> TokenizedExample:
        """Prompt and answer as an example whose supervised tokens are the answer's."""
        mask = np.zeros(len(self.ids), bool)
        mask[list(self.places)] = True
        return TokenizedExample("answer", 1, np.array(self.ids, np.int32), mask, self.domain)

    @property
    def change(self) -> float:
        """Of the answer's log-probability, adapter less base, nats."""
        return sum(token.change for token in self.tokens)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "change": self.change}
