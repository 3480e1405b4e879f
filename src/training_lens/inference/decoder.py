"""The decoder of a session: a copy of the model's modules around the same weights, with faster layers installed.

The session's model itself is never changed. An adapter is merged into copies of the weights where that loses next to
nothing of it. The copy is used only after it gave the logits of the session's model on a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from training_lens.inference.decode_loop import Decoder, SharedPrefix, prefill
from training_lens.models.adapters import base_only
from training_lens.models.copies import copy_base, copy_merged, copy_sharing_weights
from training_lens.models.fast.decoder_stack import build_stack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache
from training_lens.models.fast.layer_replacement import replace_layers
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close, relative_error
from training_lens.models.model_classes import unwrap_adapter
from training_lens.models.quantization import is_quantized
from training_lens.utils.devices import available_bytes
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory, raise_out_of_memory

logger = get_logger(__name__)
PROBE_TOKENS = 32  # of a prompt, to verify the decoder on
DECODED_TOKENS = 3  # of the probe that are decoded one by one
STACK_ROUNDINGS = 0.01  # how far the same layers may differ when they are called another way
MAX_MERGING_LOSS = 0.01  # share of the adapter's effect on the logits that merging may change
CPU_MEMORY_FACTOR = 2.5  # times the weights' bytes must be free on a CPU for merged and reordered copies of them
GPU_MEMORY_FACTOR = 1.2  # on a GPU for merged ones; all else shares their memory


class UnsupportedModelError(Exception):
    """Why the decode loop cannot run a model; its own `generate` answers then."""


@dataclass
class DecoderCache:
    """The decoder of a session, built on first use, and again when the model's weights have changed.

    Only one is kept: the base's replaces the adapter's. So the memory holds at most two copies of the decoder's weights
    besides the model's: merged and fused for many rows, and as they are for few.
    """

    _decoder: Decoder | None = None
    _state: tuple[Any, ...] = ()

    def get_decoder(self, model: Any, base: bool, prompt: Sequence[int]) -> Decoder | None:
        """The decoder; None, with the reason logged once, where only the model's own `generate` can run it.

        With `base` it is that of the model without its adapter. Logits are compared on the tokens of `prompt`.
        """
        state, before = (base, *_read_model_state(model)), self._state
        if state[:-1] != before[:-1] or not all(map(torch.equal, state[-1], before[-1])):
            self._decoder = None  # before the next one is built: both need not be in memory together
            self._decoder = _try_to_build(model, base, prompt)
            self._state = (base, *_read_model_state(model))  # building may have moved weights together
        return self._decoder


def _read_model_state(model: Any) -> tuple[Any, ...]:
    """What shows that a model's weights have changed: their addresses and versions, and the adapter's values."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    adapter = [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]
    scalings = [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return id(model), versions, scalings, adapter


def _try_to_build(model: Any, base: bool, prompt: Sequence[int]) -> Decoder | None:
    ids = torch.tensor([list(prompt[-PROBE_TOKENS:])], device=model.device)
    try:
        with torch.autocast(model.device.type, enabled=False):  # as in decoding
            return build_decoder(model, base, ids)
    except UnsupportedModelError as reason:
        log_once(f"answers come from the model's own generate: {reason}")
    except Exception as error:  # memory runs out by several kinds of error
        if not is_out_of_memory(error):
            raise
        what = f"there is no memory for a decoder ({describe_error(error)})"
        log_once(f"answers come from the model's own generate: {what}")
    return None


@cache
def log_once(message: str) -> None:
    """Log a line, once in this process."""
    logger.info("%s", message)


@torch.inference_mode()
def build_decoder(model: Any, base: bool, ids: Tensor) -> Decoder:
    """A decoder that gives the model's logits for `ids`, (1, tokens) int64; the model is not changed.

    Cost: some forward passes over `ids`, and the memory of the weights once more where that is free.

    Raises:
        UnsupportedModelError: the model caches something else than keys and values, or the logits differ.
    """
    windows = _attention_windows(model)
    with base_only(model, base):
        wanted: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    copied = _copy_for_decoding(model, base, ids, wanted)
    keeps_last = "logits_to_keep" in inspect.signature(type(copied).forward).parameters
    decoder = Decoder(copied, windows, keeps_last, copied.dtype, ids.device)
    refusals = ["there is no memory for copies of the weights"]
    if ids.device.type != "cpu" or _has_memory_for_copy(copied, ids.device):
        refusals = replace_layers(copied, ids)
    _verify_decoding(decoder, ids, wanted)
    try:
        return _add_stack(decoder, ids[0].tolist())
    except UnknownLayerError as reason:
        log_once(f"answers come layer by layer from {type(copied).__name__}: {'; '.join([*refusals, str(reason)])}")
        return decoder


def _attention_windows(model: Any) -> tuple[int | None, ...]:
    """The attention window of each layer, None for full attention; refuses all other layers, and several devices."""
    config = model.config.get_text_config()
    name = config.model_type
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} keeps something else than keys and values")
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        raise UnsupportedModelError("the model is spread over several devices")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise UnsupportedModelError(f"{name} has layers of {unknown[0]}")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _copy_for_decoding(model: Any, base: bool, ids: Tensor, wanted: Tensor) -> Any:
    """A copy of the model's modules: without adapter, with it merged, or with it beside the weights."""
    if not hasattr(model, "disable_adapter"):
        return copy_sharing_weights(model)
    if base:
        return copy_base(model)
    if is_quantized(model) or not _has_memory_for_copy(model, ids.device):
        return copy_sharing_weights(unwrap_adapter(model))
    merged = copy_merged(model)
    loss = _merging_loss(model, merged, ids, wanted)
    if loss <= MAX_MERGING_LOSS:
        return merged
    log_once(
        f"the adapter answers unmerged: in {str(merged.dtype).removeprefix('torch.')}, merging would change "
        f"{loss:.0%} of its effect on the scores"
    )
    return copy_sharing_weights(unwrap_adapter(model))


def _merging_loss(model: Any, merged: Any, ids: Tensor, wanted: Tensor) -> float:
    """|merged - adapter| / |adapter - base| of the logits, as root mean squares; 0 where it is rounding in float32.

    Both are measured in the weights' dtype: rounding that hides the adapter counts as loss.
    """
    found: Tensor = merged(input_ids=ids, use_cache=False).logits[0]
    error = relative_error(found, wanted)
    if error == 0 or (found.dtype == torch.float32 and is_close(found, wanted, WHOLE_MODEL)):
        return 0.0
    with base_only(model):
        plain: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return error / max(relative_error(plain, wanted), 1e-30)


def _has_memory_for_copy(model: Any, device: torch.device) -> bool:
    """Whether copies of the weights fit into memory; True where the free memory is unknown."""
    free = available_bytes(device)
    factor = CPU_MEMORY_FACTOR if device.type == "cpu" else GPU_MEMORY_FACTOR
    return free is None or free > factor * sum(p.numel() * p.element_size() for p in model.parameters())


def _verify_decoding(decoder: Decoder, ids: Tensor, wanted: Tensor) -> None:
    """Prefill and decode the probe in two rows, one of them padded, and refuse a model whose logits differ."""
    try:
        found = _decode_probe(decoder, ids[0].tolist())
    except Exception as error:  # foreign code, called in a way that it may not know
        if is_out_of_memory(error):
            raise
        name = type(decoder.model).__name__
        raise UnsupportedModelError(f"{name} cannot be decoded row by row: {describe_error(error)}") from error
    wanted = wanted[-len(found) :]
    if not is_close(found, wanted, WHOLE_MODEL):
        apart = relative_error(found, wanted)
        raise UnsupportedModelError(f"{type(decoder.model).__name__} gives other scores row by row, {apart:.1%} apart")


def _add_stack(decoder: Decoder, tokens: list[int]) -> Decoder:
    """The decoder with its own forward pass through the layers; UnknownLayerError if its modules' logits differ."""
    faster = replace(decoder, stack=build_stack(decoder.model, decoder.windows))
    try:
        found = _decode_probe(faster, tokens)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise_out_of_memory(error)
        raise UnknownLayerError(f"its parts are called in another way ({describe_error(error)})") from error
    if not is_close(found, _decode_probe(decoder, tokens), STACK_ROUNDINGS):
        raise UnknownLayerError("it computes more than its parts do")
    return faster


def _decode_probe(decoder: Decoder, tokens: list[int]) -> Tensor:
    """Logits after each of the last `DECODED_TOKENS` + 1 tokens, all but the first of them decoded."""
    count = min(DECODED_TOKENS, len(tokens) - 1)
    start = len(tokens) - count
    prompts = [tokens[:start], tokens[:1]]
    first, prompt = prefill(decoder, prompts, SharedPrefix())
    slots = SlotCache(2, len(tokens) + 1, decoder.windows, decoder.dtype, decoder.device)
    slots.columns.end = start
    for row, length in enumerate((start, 1)):
        slots.write_prompt(row, prompt, row, 0, length)
    logits = [first[0]]
    for i in range(count):
        slots.open_column()
        step = torch.tensor([[tokens[start + i]], [tokens[0]]], device=decoder.device)
        positions = torch.tensor([[start + i], [1 + i]], device=decoder.device)
        logits.append(decoder.compute_logits(step, positions, slots.attention_masks(), slots)[0])
    return torch.stack(logits)
