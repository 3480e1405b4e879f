"""The sampler: the next token of each row, greedy or drawn, after the logits processors of a generation config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.drafts import NgramDrafts
from training_lens.models.fast.row_adapters import AdapterOfRow

# These read only the scores, so all rows go through them together.
ROWWISE = {f"{name}LogitsWarper" for name in ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta")}
UNSUPPORTED_OPTIONS = {  # what `generate` does besides sampling from scores, with the values that switch it off
    "guidance_scale": (None, 1, 1.0),
    "stop_strings": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
    "forced_eos_token_id": (None,),
    "num_return_sequences": (None, 1),
    "token_healing": (None, False),
}


@dataclass(eq=False)
class Completion:
    """The tokens generated so far for one prompt.

    Args:
        stop_ids: tokens that end the answer; they are not part of it.
        on_token: called with each token of the answer.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    on_token: Callable[[int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    has_stopped: bool = False  # by a stop token; otherwise the answer was cut at `max_new_tokens`
    processors: Any = None
    adapter: AdapterOfRow | None = None  # where the decoder has several adapters; None: the base alone
    drafts: NgramDrafts | None = None  # for speculative decoding; None: a token a step

    @property
    def max_length(self) -> int:
        """The most tokens that prompt and answer can have together."""
        return len(self.prompt) + self.max_new_tokens

    def add_token(self, token: int) -> bool:
        """Take the next token; whether the answer is finished with it."""
        self.has_stopped = token in self.stop_ids
        if self.has_stopped:
            return True
        self.tokens.append(token)
        if self.on_token:
            self.on_token(token)
        return len(self.tokens) == self.max_new_tokens

    def draft_tokens(self) -> list[int]:
        """Tokens that may come next, to be verified; fewer than are left to `max_new_tokens`."""
        most = self.max_new_tokens - len(self.tokens) - 1
        return self.drafts.propose(self.prompt, self.tokens, most) if self.drafts and most else []

    def note_step(self, drafted: int, accepted: int, unused: int) -> None:
        """Take note of a step: how long the draft was, how much of it was right, and for nothing sampled tokens."""
        if self.drafts and drafted:
            self.drafts.note_accepted(drafted, accepted)

    def restart(self) -> None:
        """Drop the generated tokens."""
        self.tokens.clear()
        self.has_stopped = False
        self.drafts = self.drafts and NgramDrafts()


def generation_options(settings: InferenceSection, stop_ids: frozenset[int], pad_id: int) -> dict[str, Any]:
    """Options of `generate` for these settings; temperature 0 is greedy."""
    is_sampled = settings.temperature != 0
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or 0}
    return {
        "do_sample": is_sampled,
        **(sampling if is_sampled else {}),
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": sorted(stop_ids) or None,
        "pad_token_id": pad_id,
    }


class Sampler:
    """Samples the tokens that the model's own `generate` with these options gives for each prompt alone."""

    def __init__(self, model: Any, options: dict[str, Any], device: torch.device) -> None:
        self._model, self._device = model, device
        self.config, _ = model._prepare_generation_config(None, **options)
        model._prepare_special_tokens(self.config, kwargs_has_attention_mask=True, device=device)
        self._shared_processors = self._build_processors([0])
        self._is_rowwise = all(type(p).__name__ in ROWWISE for p in self._shared_processors)

    @property
    def unsupported_option(self) -> str | None:
        """What the generation config asks for besides sampling from scores; None if nothing."""
        mode = self.config.get_generation_mode().value
        if mode not in ("greedy_search", "sample"):
            return str(mode).replace("_", " ")
        options = UNSUPPORTED_OPTIONS.items()
        return next((name for name, off in options if getattr(self.config, name, None) not in off), None)

    def start_drafts(self, settings: InferenceSection) -> NgramDrafts | None:
        """The drafts of a new completion; None where they are off, or do not suit how tokens are chosen.

        Drawn tokens are not drafted: that would take other random numbers. Nor are those that are chosen by a row's
        tokens so far, which a draft would have to be counted among.
        """
        suits = self._is_rowwise and not self.config.do_sample
        return NgramDrafts() if suits and settings.drafts == "auto" else None

    def sample_next_token(self, logits: Tensor, rows: Sequence[Completion | None]) -> Tensor:
        """The next token of each row, (rows,) int64, from logits (rows, vocabulary); arbitrary for an empty row."""
        scores = self.process_scores(logits, rows)
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)

    def process_scores(self, logits: Tensor, rows: Sequence[Completion | None]) -> Tensor:
        """The scores that tokens are chosen by, (rows, vocabulary) float32."""
        scores = logits.float()
        if self._is_rowwise:
            processed: Tensor = self._shared_processors(None, scores)
            return processed
        return torch.cat([self._process_row(scores[i : i + 1], row) for i, row in enumerate(rows)])

    def _process_row(self, scores: Tensor, row: Completion | None) -> Tensor:
        """The scores of one row, (1, vocabulary), after processors that see this row's tokens alone."""
        if row is None:
            return scores
        if row.processors is None:
            row.processors = self._build_processors(row.prompt)
        ids = torch.tensor([[*row.prompt, *row.tokens]], device=self._device)
        processed: Tensor = row.processors(ids, scores)
        return processed

    def _build_processors(self, prompt: Sequence[int]) -> Any:
        from transformers import LogitsProcessorList

        ids = torch.tensor([list(prompt)], device=self._device)
        return self._model._get_logits_processor(
            self.config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=ids,
            logits_processor=LogitsProcessorList(),
            device=str(self._device),
        )
