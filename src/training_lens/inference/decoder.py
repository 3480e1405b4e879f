"""The model that decodes for a session: a copy of its modules around its own weights, with faster layers in place.

The session's model itself is never changed. An adapter is merged into copies of the weights where that loses next to
nothing of it. Before the copy is used, it must say what the session's model says of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from training_lens.inference.decode_loop import Beginning, Decoder, read
from training_lens.models.adapters import base_only
from training_lens.models.copies import base_copy, is_quantized, merged_copy, sharing_copy
from training_lens.models.fast.decoder_stack import build_stack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache
from training_lens.models.fast.layer_replacement import replace_layers
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close, relative_error
from training_lens.utils.devices import available_bytes
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
PROBE = 32  # tokens of a prompt that replacements are tried on
REHEARSED = 3  # of them are decoded one by one
EQUAL = 0.01  # roundings that the same layers may be apart when they are called another way
LOST = 0.01  # of what the adapter does to the scores: what merging may change
ROOM = 2.5  # times the weights' bytes must be free for copies of them
_told: set[str] = set()


class UncoveredError(Exception):
    """Why a model cannot be decoded here; its own `generate` answers then."""


@dataclass
class Decoders:
    """The decoder of a session, made when it is first asked for, and anew when the model's weights have changed.

    One is kept: that of the base takes the place of that of the adapter, so that beside the model's weights there are
    one decoder's, twice at most: merged and as they are for many rows, and as they are for few.
    """

    _made: Decoder | None = None
    _of: tuple[Any, ...] = ()

    def get(self, model: Any, base: bool, prompt: Sequence[int]) -> Decoder | None:
        """The decoder; None where the model is of a kind that only its own `generate` can run, which is said once.

        Args:
            base: of the model without its adapter.
            prompt: real tokens to compare results on.
        """
        state = (base, *_state(model))
        if not _equal(state, self._of):
            self._made = None  # before the next one is made: the two need not be in memory together
            self._made, self._of = _try(model, base, prompt), state
        return self._made


def _state(model: Any) -> tuple[Any, ...]:
    """What tells whether the model computes what it did: places and versions of its weights, the adapter's values."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    adapter = [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]
    scalings = [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return id(model), versions, scalings, adapter


def _equal(state: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    if not before or state[:-1] != before[:-1]:
        return False
    return all(torch.equal(a, b) for a, b in zip(state[-1], before[-1], strict=True))


def _try(model: Any, base: bool, prompt: Sequence[int]) -> Decoder | None:
    ids = torch.tensor([list(prompt[-PROBE:])], device=model.device)
    try:
        with torch.autocast(model.device.type, enabled=False):  # as it will decode
            return make_decoder(model, base, ids)
    except UncoveredError as reason:
        say_once(f"answers come from the model's own generate: {reason}")
    except Exception as error:  # memory runs out by several kinds of error
        if not is_out_of_memory(error):
            raise
        say_once(
            f"answers come from the model's own generate: there is no memory for a decoder ({describe_error(error)})"
        )
    return None


def say_once(message: str) -> None:
    """Log a line, once in this process."""
    if message not in _told:
        _told.add(message)
        logger.info("%s", message)


@torch.inference_mode()
def make_decoder(model: Any, base: bool, ids: Tensor) -> Decoder:
    """A decoder that says what the model says of `ids`, (1, tokens) int64; the model stays as it is.

    Costs some passes over `ids`, and the memory of the weights once more where that is free.

    Raises:
        UncoveredError: the model keeps something else than keys and values, or does not say the same.
    """
    windows = _windows(model)
    with base_only(model, base):
        wanted: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    plain = _plain(model, base, ids, wanted)
    keeps_last = "logits_to_keep" in inspect.signature(type(plain).forward).parameters
    decoder = Decoder(plain, windows, keeps_last, plain.dtype, ids.device)
    if _has_room(plain, ids.device):
        replace_layers(plain, ids)
    _rehearse(decoder, ids, wanted)
    return _stacked(decoder, ids[0].tolist())


def _windows(model: Any) -> tuple[int | None, ...]:
    """How far each layer sees, None for all.

    Raises:
        UncoveredError: a layer is no plain or sliding attention, or the model is spread over devices.
    """
    config = model.config.get_text_config()
    name = config.model_type
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise UncoveredError(f"{name} keeps something else than keys and values")
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        raise UncoveredError("the model is spread over several devices")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise UncoveredError(f"{name} has layers of {unknown[0]}")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _plain(model: Any, base: bool, ids: Tensor, wanted: Tensor) -> Any:
    """A copy of the model's modules: without adapter, with it merged, or with it beside the weights."""
    if not hasattr(model, "disable_adapter"):
        return sharing_copy(model)
    if base:
        return base_copy(model)
    if is_quantized(model) or not _has_room(model, ids.device):
        return sharing_copy(model.get_base_model())
    merged = merged_copy(model)
    lost = _lost_by_merging(model, merged, ids, wanted)
    if lost <= LOST:
        return merged
    say_once(
        f"the adapter answers unmerged: in {str(merged.dtype).removeprefix('torch.')}, merging would change "
        f"{lost:.0%} of what it does to the scores"
    )
    return sharing_copy(model.get_base_model())


def _lost_by_merging(model: Any, merged: Any, ids: Tensor, wanted: Tensor) -> float:
    """|merged - adapter| / |adapter - base| of the scores, as root mean squares; 0 where it is rounding in float32.

    Both are measured in the weights' number type: rounding that hides the adapter counts as loss.
    """
    found: Tensor = merged(input_ids=ids, use_cache=False).logits[0]
    if found.dtype == torch.float32 and is_close(found, wanted, WHOLE_MODEL):
        return 0.0
    error = relative_error(found, wanted)
    if error == 0:
        return 0.0
    with base_only(model):
        plain: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return error / max(relative_error(plain, wanted), 1e-30)


def _has_room(model: Any, device: torch.device) -> bool:
    """Whether there is memory for copies of the weights; where nobody can tell, there is."""
    free = available_bytes(device)
    return free is None or free > ROOM * sum(p.numel() * p.element_size() for p in model.parameters())


def _rehearse(decoder: Decoder, ids: Tensor, wanted: Tensor) -> None:
    """Read and decode the probe in two places, one of them padded; refuse a decoder that gives other scores.

    Raises:
        UncoveredError: it does, or it fails.
    """
    count = min(REHEARSED, ids.shape[1] - 1)
    try:
        found = _decoded(decoder, ids[0].tolist(), count)
    except Exception as error:  # foreign code, asked in a way that it may not know
        if is_out_of_memory(error):
            raise
        raise UncoveredError(
            f"{type(decoder.model).__name__} cannot be decoded row by row: {describe_error(error)}"
        ) from error
    if not is_close(found, wanted[-1 - count :], WHOLE_MODEL):
        apart = relative_error(found, wanted[-1 - count :])
        raise UncoveredError(f"{type(decoder.model).__name__} gives other scores row by row, {apart:.1%} apart")


def _stacked(decoder: Decoder, tokens: list[int]) -> Decoder:
    """The decoder by its stack, where it has one that says what its modules say: they are the same layers."""
    stack = build_stack(decoder.model, decoder.windows)
    if stack is None:
        return decoder
    faster, count = replace(decoder, stack=stack), min(REHEARSED, len(tokens) - 1)
    try:
        found = _decoded(faster, tokens, count)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        logger.debug(
            "%s looks like a plain decoder, and is none: %s", type(decoder.model).__name__, describe_error(error)
        )
        return decoder
    return faster if is_close(found, _decoded(decoder, tokens, count), EQUAL) else decoder


def _decoded(decoder: Decoder, tokens: list[int], count: int) -> Tensor:
    """Scores after each of the last `count` + 1 tokens, all but the first of them decoded, (count + 1, vocabulary)."""
    start = len(tokens) - count
    prompts = [tokens[:start], tokens[:1]]
    first, prompt = read(decoder, prompts, Beginning(0, None))
    cache = SlotCache(2, len(tokens) + 1, decoder.windows, decoder.dtype, decoder.device)
    cache.columns.end = start
    for row, length in enumerate((start, 1)):
        cache.write_prompt(row, prompt, row, 0, length)
    scores = [first[0]]
    for i in range(count):
        cache.open_column()
        step = torch.tensor([[tokens[start + i]], [tokens[0]]], device=decoder.device)
        places = torch.tensor([[start + i], [1 + i]], device=decoder.device)
        scores.append(decoder.logits(step, places, cache.attention_masks(), cache)[0])
    return torch.stack(scores)
