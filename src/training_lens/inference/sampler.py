"""Which token comes next: the likeliest, or one that is drawn, after all that a generation config asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWWISE = {  # these look at the scores alone, so all rows go through them together
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
}
ELSEWHERE = {  # what `generate` does besides choosing from scores
    "guidance_scale": (None, 1, 1.0),
    "stop_strings": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
    "forced_eos_token_id": (None,),
    "num_return_sequences": (None, 1),
    "token_healing": (None, False),
}


@dataclass(eq=False)
class Answer:
    """An answer under way: at most `room` tokens to a prompt, which is the `index`-th of a call.

    `has_ended`: the model gave a token that ends an answer; without it, the answer was cut where its room ended.
    """

    index: int
    prompt: Sequence[int]
    room: int
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False
    processors: Any = None


class Choice:
    """Chooses as the model's own `generate` does for each prompt alone.

    Args:
        options: what `generate` is given, as keywords.
    """

    def __init__(self, model: Any, options: dict[str, Any], device: torch.device) -> None:
        self._model, self._device = model, device
        self.config, _ = model._prepare_generation_config(None, **options)
        model._prepare_special_tokens(self.config, kwargs_has_attention_mask=True, device=device)
        self._processors_of_all = self._processors([0])
        self._together = all(type(p).__name__ in ROWWISE for p in self._processors_of_all)

    @property
    def uncovered(self) -> str | None:
        """What the generation config asks that is no choice from scores; None where there is nothing such."""
        mode = self.config.get_generation_mode().value
        if mode not in ("greedy_search", "sample"):
            return str(mode).replace("_", " ")
        return next((name for name, plain in ELSEWHERE.items() if getattr(self.config, name, None) not in plain), None)

    def __call__(self, logits: Tensor, rows: Sequence[Answer | None]) -> Tensor:
        """The next token of each row, (rows,) int64; of a row without answer, any.

        Args:
            logits: (rows, vocabulary).
        """
        scores = logits.float()
        if self._together:
            scores = self._processors_of_all(None, scores)
        else:
            scores = torch.cat([self._of_one(scores[i : i + 1], row) for i, row in enumerate(rows)])
        if self.config.do_sample:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)

    def _of_one(self, scores: Tensor, row: Answer | None) -> Tensor:
        """What the processors make of the scores of one row, (1, vocabulary), which see that row's tokens alone."""
        if row is None:
            return scores
        if row.processors is None:
            row.processors = self._processors(row.prompt)
        ids = torch.tensor([[*row.prompt, *row.tokens]], device=self._device)
        processed: Tensor = row.processors(ids, scores)
        return processed

    def _processors(self, prompt: Sequence[int]) -> Any:
        from transformers import LogitsProcessorList

        ids = torch.tensor([list(prompt)], device=self._device)
        return self._model._get_logits_processor(
            self.config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=ids,
            logits_processor=LogitsProcessorList(),
            device=str(self._device),
        )
