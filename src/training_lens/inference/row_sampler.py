"""The sampler of rows that each have their own settings, seed and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training_lens.inference.sampler import Completion, Sampler


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability in nats, and those of the likeliest ones, the likeliest first.

    They are the model's own: before temperature, top_p, top_k and the processors of a generation config.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, kw_only=True)
class SampledCompletion(Completion):
    """A completion with its own sampler and, where that draws, its own generator of random numbers.

    Args:
        top_logprobs: how many of the likeliest tokens `logprobs` names beside each token; None: `logprobs` stays empty.
    """

    sampler: Sampler
    generator: torch.Generator | None = None
    top_logprobs: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def note_step(self, drafted: int, accepted: int, unused: int) -> None:
        """As `Completion.note_step`; the log-probabilities of unused tokens are dropped."""
        super().note_step(drafted, accepted, unused)
        if unused and self.top_logprobs is not None:
            del self.logprobs[-unused:]


class RowSampler:
    """Samples each row as it would be sampled alone, whatever rows are beside it."""

    def sample_next_token(self, logits: Tensor, rows: Sequence[Completion | None]) -> Tensor:
        """As `Sampler.sample_next_token`, for rows that are `SampledCompletion`s."""
        own = {i: row for i, row in enumerate(rows) if isinstance(row, SampledCompletion)}
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        for sampler in dict.fromkeys(row.sampler for row in own.values()):
            places = [i for i, row in own.items() if row.sampler is sampler]
            index = torch.tensor(places, device=logits.device)
            scores = sampler.process_scores(logits.index_select(0, index), [own[i] for i in places])
            tokens[index] = _choose_tokens(scores, [own[i] for i in places])
        _note_logprobs(logits, own, tokens)
        return tokens


def _choose_tokens(scores: Tensor, rows: Sequence[SampledCompletion]) -> Tensor:
    """The token of each row of scores, (rows, vocabulary): the best, or drawn where the rows have generators."""
    if rows[0].generator is None:
        return scores.argmax(-1)
    shares = scores.softmax(-1)
    drawn = [torch.multinomial(shares[i : i + 1], 1, generator=row.generator) for i, row in enumerate(rows)]
    return torch.cat(drawn).squeeze(1)


def _note_logprobs(logits: Tensor, rows: dict[int, SampledCompletion], tokens: Tensor) -> None:
    """Give each row that asks for them the log-probabilities of its next token. Cost: a sync point where any does."""
    for i, row in rows.items():
        if row.top_logprobs is None:
            continue
        logprobs = logits[i].float().log_softmax(-1)
        top = logprobs.topk(min(row.top_logprobs, len(logprobs)))
        token = int(tokens[i])
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        row.logprobs.append(TokenLogprobs(token, float(logprobs[token]), pairs))
