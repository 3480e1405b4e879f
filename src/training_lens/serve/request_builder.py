"""From a request of the API to prompts, and to rows of the decode loop."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message, Row
from training_lens.data.messages import read_chat
from training_lens.data.notes import DataNotes
from training_lens.data.row_keys import KeyCheck
from training_lens.data.tool_calls import read_tools
from training_lens.errors import DatasetError, TrainingLensError
from training_lens.inference.generator import SEED_STRIDE
from training_lens.inference.session import PromptTooLongError
from training_lens.serve.api_errors import ApiError, prompt_too_long
from training_lens.serve.api_types import ChatRequest, CompletionRequest, GenerationRequest
from training_lens.serve.running_request import RunningRequest, ServedRow
from training_lens.serve.scheduler import Outbox
from training_lens.serve.served_models import ServedModel, ServedModels
from training_lens.serve.text_stream import TextStream

PLACE = "request"  # stands for a file's name in messages about a chat
SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the rows of requests, for `Scheduler.submit_request`.

    Args:
        defaults: temperature, top_p, top_k and the longest answer of requests that leave them out.
        outbox: takes the rows' pieces.
        seconds: that each request may take.
    """

    models: ServedModels
    defaults: InferenceSection
    outbox: Outbox
    seconds: float
    tokenizing: threading.Lock = field(default_factory=threading.Lock)  # tokenizers are not thread-safe

    def build_request(self, asked: GenerationRequest) -> RunningRequest:
        """The request with its rows. May be called from several threads.

        Raises:
            ApiError: it cannot be answered.
        """
        model = self.models.find_model(asked.model)
        prompts = self._tokenize(model, asked)
        running = RunningRequest(model, self.seconds, bool(asked.stream))
        running.rows += self._build_rows(running, asked, prompts)
        return running

    def _tokenize(self, model: ServedModel, asked: GenerationRequest) -> list[list[int]]:
        try:
            with self.tokenizing:
                prompts = _read_prompts(model, asked)
        except PromptTooLongError as error:
            raise prompt_too_long(str(error)) from error
        except TrainingLensError as error:
            raise ApiError(400, str(error), "invalid_value") from error
        longest = max(map(len, prompts))
        if model.positions and longest >= model.positions:
            raise prompt_too_long(f"a prompt has {longest} tokens, the model {model.positions} positions.")
        return prompts

    def _build_rows(
        self, running: RunningRequest, asked: GenerationRequest, prompts: Sequence[list[int]]
    ) -> list[ServedRow]:
        """A row for each answer: `n` for each prompt, in the prompts' order."""
        given = {key: value for key in SAMPLING if (value := getattr(asked, key)) is not None}
        settings = self.defaults.model_copy(update=given)
        model, seed = running.model, random.getrandbits(32) if asked.seed is None else asked.seed
        adapter, sampler = model.choose_adapter(asked.adapter_scale), model.choose_sampler(settings)
        stop_ids = frozenset[int]() if asked.ignore_eos else model.session.stop_ids
        longest = asked.longest_answer or self.defaults.max_new_tokens
        return [
            ServedRow(
                prompt,
                min(longest, model.positions - len(prompt) if model.positions else longest),
                stop_ids,
                sampler=sampler,
                adapter=adapter,
                generator=_seed_generator(seed, index, model) if settings.temperature else None,
                top_logprobs=asked.logprob_count,
                drafts=sampler.start_drafts(settings),
                request=running,
                index=index,
                text=TextStream(model.decode, asked.stops) if asked.stream or asked.stops else None,
                outbox=self.outbox,
            )
            for index, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.choices))
        ]


def _read_prompts(model: ServedModel, asked: GenerationRequest) -> list[list[int]]:
    """The tokens of each prompt."""
    if isinstance(asked, ChatRequest):
        messages, tools = _read_messages(asked)
        return [model.session.prompt_ids(messages, asked.domain, tools)]
    assert isinstance(asked, CompletionRequest)
    return [_read_text_prompt(model, prompt, asked.domain) for prompt in asked.prompts]


def _read_messages(asked: ChatRequest) -> tuple[tuple[Message, ...], Sequence[Mapping[str, Any]]]:
    """The messages of a chat and its tools, read as those of a row in training."""
    row = Row(PLACE, 1, {"messages": asked.messages, "tools": asked.shown_tools})
    try:
        messages, _ = read_chat(row, "messages", asked.messages, KeyCheck(PLACE, DataNotes()))
        tools = read_tools(row, "tools")
    except DatasetError as error:
        message = str(error).removeprefix(f"{row.place}, ").removeprefix(f"{row.place}: ")
        raise ApiError(400, message, "invalid_value", "messages") from error
    if messages[-1].role not in ("user", "tool"):
        raise ApiError(400, "messages: the last one must be a user's or a tool's.", "invalid_value", "messages")
    return messages, tools


def _read_text_prompt(model: ServedModel, prompt: str | list[int], domain: str | None) -> list[int]:
    """The tokens of a text that is continued without a template; tokens stay as they are."""
    if isinstance(prompt, str):
        return model.session.text_ids(prompt, domain)
    size = model.session.model.get_input_embeddings().weight.shape[0]
    wrong = next((token for token in prompt if token >= size), None)
    if wrong is not None:
        raise ApiError(
            400, f"prompt: token {wrong} is outside the model's vocabulary of {size}.", "invalid_value", "prompt"
        )
    model.session.require_room(prompt)
    return prompt


def _seed_generator(seed: int, index: int, model: ServedModel) -> torch.Generator:
    """The random numbers of one answer; the first one of a request draws as `infer` does with this seed."""
    generator = torch.Generator(model.session.device)
    return generator.manual_seed((seed + index * SEED_STRIDE) % 2**32)
