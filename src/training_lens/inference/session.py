"""A finished run, ready to answer: its model with adapter, and prompts rendered as in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training_lens.config.schema import TrainingConfig
from training_lens.data.templates import Renderer, build_renderer
from training_lens.data.tokenization import TextEncoder
from training_lens.data.types import Example, Message
from training_lens.errors import ConfigurationError
from training_lens.models.adapters import load_adapter
from training_lens.models.factory import load_model, load_tokenizer
from training_lens.utils.devices import Precision, get_device, resolve_precision
from training_lens.utils.formatting import nearest
from training_lens.utils.runs import RunFolder


@dataclass(frozen=True)
class Session:
    """A model that answers, with all that rendering a prompt takes; `domains` are those it was trained on."""

    model: Any
    tokenizer: Any
    encoder: TextEncoder
    renderer: Renderer
    config: TrainingConfig
    domains: tuple[str, ...]
    stop_ids: frozenset[int]
    device: torch.device
    precision: Precision

    @property
    def pad_id(self) -> int:
        """What fills the masked places of a batch."""
        return self.encoder.eos_id

    def prompt_ids(self, messages: Sequence[Message], domain: str | None = None) -> list[int]:
        """The tokens of a prompt, exactly as training would have made them.

        Raises:
            ConfigurationError: a domain that the run does not know, or a prompt that leaves no room to answer.
        """
        if domain is not None and domain not in self.domains:
            known = f"it knows {', '.join(self.domains)}" if self.domains else "it was trained without domains"
            close = nearest(domain, self.domains)
            raise ConfigurationError(f"--domain {domain}: {known}.{f' Did you mean {close}?' if close else ''}")
        return self._fitting(self.encoder.prompt_ids(self.renderer.prompt(messages, domain)))

    def _fitting(self, ids: list[int]) -> list[int]:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and len(ids) >= positions:
            raise ConfigurationError(
                f"the prompt has {len(ids)} tokens, the model {positions} positions: no room to answer. Shorten it."
            )
        return ids


def open_run(run: RunFolder, device: str | None = None) -> Session:
    """The run's model with its adapter, its tokenizer as saved, its template and domains.

    Args:
        device: as `model.device`; None takes the run's.

    Raises:
        CheckpointError: the run has no finished adapter; ModelLoadingError, AdapterError: it cannot be loaded.
    """
    config = TrainingConfig.model_validate(run.read_metadata("config.json"))
    place = get_device(device or config.model.device)
    trained = config.training.precision
    # fp16 exists on CUDA alone: elsewhere such a run answers in the device's own precision.
    elsewhere = device is not None or (trained == "fp16" and place.type != "cuda")
    precision = resolve_precision("auto" if elsewhere else trained, place)
    tokenizer = load_tokenizer(config.model, str(run.tokenizer))
    renderer = build_renderer(config.data, tokenizer)
    encoder = TextEncoder(tokenizer)
    model = load_adapter(load_model(config.model, place, precision), run.adapter)
    domains = tuple(run.read_metadata("data.json")["domains"])
    stop_ids = _stop_ids(model, encoder, renderer)
    return Session(model, tokenizer, encoder, renderer, config, domains, stop_ids, place, precision)


def _stop_ids(model: Any, encoder: TextEncoder, renderer: Renderer) -> frozenset[int]:
    """EOS, what the model's generation config stops at, and the end token that the template gives an answer."""
    example = Example((Message("user", "a"), Message("assistant", "b")), None, "", 0)
    end = int(encoder.encode([renderer.example(example)])[0].input_ids[-1])
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset({encoder.eos_id, end, *(i for i in listed if i is not None)})
