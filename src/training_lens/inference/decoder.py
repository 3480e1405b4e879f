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

from training_lens.inference.decode_loop import NO_PREFIX, Decoder, prefill
from training_lens.models.adapters import base_only, is_adapter_key
from training_lens.models.copies import copy_base, copy_merged, copy_sharing_weights, merge_token_rows
from training_lens.models.fast.decoder_stack import build_stack
from training_lens.models.fast.kv_cache import FULL, SLIDING, SlotCache
from training_lens.models.fast.layer_replacement import replace_layers
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.row_adapters import AdapterOfRow
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close, relative_error
from training_lens.models.model_classes import unwrap_adapter
from training_lens.models.quantization import is_quantized
from training_lens.models.sharding import has_sharded_layers
from training_lens.utils.devices import available_bytes
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory, raise_out_of_memory

logger = get_logger(__name__)
PROBE_TOKENS = 32  # of a prompt, to verify the decoder on
DECODED_TOKENS = 3  # of the probe that are decoded one by one
STACK_ROUNDINGS = 0.1  # how far the same layers may differ when they are called another way: some roundings
MAX_MERGING_LOSS = 0.01  # share of the adapter's effect on the logits that merging may change
CPU_MEMORY_FACTOR = 2.5  # times the weights' bytes must be free on a CPU for merged and reordered copies of them
GPU_MEMORY_FACTOR = 1.2  # on a GPU for merged ones; all else shares their memory
KEPT_SHARE = 0.05  # of the free memory: what copies may take while a run trains on


class UnsupportedModelError(Exception):
    """Why the decode loop cannot run a model; its own `generate` answers then."""


@dataclass
class DecoderCache:
    """The decoder of a session, built on first use, and anew where any of the model's weights have changed since.

    Nothing is carried over: merged weights, products prepared for decoding, and which layers give the same results all
    depend on the adapter's values. So a training's answers do not depend on the decoders before, and a resumed run
    gives those of one that was never stopped. Only one is kept: the base's replaces the adapter's.
    """

    _decoder: Decoder | None = None
    _state: _ModelState | None = None

    def get_decoder(self, model: Any, base: bool, prompt: Sequence[int]) -> Decoder | None:
        """The decoder; None, with the reason logged once, where only the model's own `generate` can run it.

        With `base` it is that of the model without its adapter. Logits are compared on the tokens of `prompt`.
        """
        if has_sharded_layers(model):
            log_once("answers come from the model's own generate: its base is shared out over processes")
            return None
        if self._state is None or not self._state.is_same(_read_model_state(model, base)):
            self.clear()  # before the next one is built: both need not be in memory together
            self._decoder = _try_to_build(model, base, prompt)
            self._state = _read_model_state(model, base).copy()  # building may have moved weights together
        return self._decoder

    def clear(self) -> None:
        """Free the decoder."""
        self._decoder = self._state = None

    def clear_if_large(self, model: Any) -> None:
        """Free the decoder where its copies of the weights may take much of the free memory."""
        free = available_bytes(model.device)
        if free is not None and _count_copied_bytes(model, model.device) > KEPT_SHARE * free:
            self.clear()


@dataclass(frozen=True)
class _ModelState:
    """What shows that a model's weights have changed: those that training changes by value, all others by address.

    Not by version alone: some optimizers write past it.
    """

    frozen: tuple[Any, ...]
    trained: Sequence[Tensor]

    def is_same(self, other: _ModelState) -> bool:
        return self.frozen == other.frozen and all(map(torch.equal, self.trained, other.trained))

    def copy(self) -> _ModelState:
        """As it is now, whatever becomes of the model. Memory: the trained weights once more."""
        return replace(self, trained=[p.detach().clone() for p in self.trained])


def _read_model_state(model: Any, base: bool) -> _ModelState:
    """The state of a model, whose adapter does not matter for a decoder of its `base`."""
    trained = [p for name, p in model.named_parameters() if p.requires_grad or is_adapter_key(name)]
    others = {id(p) for p in trained}
    versions = [
        (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version)
        for t in [*model.parameters(), *model.buffers()]
        if id(t) not in others
    ]
    scalings = [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    layout = [(p.data_ptr(), p.dtype, p.shape) for p in trained]
    return _ModelState((base, id(model), versions, scalings, layout), [] if base else trained)


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
    layers = {module: path for path, module in copied.named_modules()}  # keeps them: no id of theirs is given again
    paths = {id(module): path for module, path in layers.items()}
    decoder = Decoder(copied, windows, keeps_last, copied.dtype, ids.device, paths=paths)
    refusals = ["there is no memory for copies of the weights"]
    if ids.device.type != "cpu" or _has_memory_for_copy(copied, ids.device):
        refusals = replace_layers(copied, ids)
    by_modules = _verify_decoding(decoder, ids, wanted)
    try:
        return _add_stack(decoder, ids[0].tolist(), by_modules)
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
        return _copy_unmerged(model)
    merged = copy_merged(model)
    loss = _merging_loss(model, merged, ids, wanted)
    if loss <= MAX_MERGING_LOSS:
        return merged
    log_once(
        f"the adapter answers unmerged: in {str(merged.dtype).removeprefix('torch.')}, merging would change "
        f"{loss:.0%} of its effect on the scores"
    )
    return _copy_unmerged(model)


def _copy_unmerged(model: Any) -> Any:
    """A copy with the adapter beside the weights; rows of new tokens, which merging does not round, are among them."""
    copied = copy_sharing_weights(unwrap_adapter(model))
    merge_token_rows(copied)
    return copied


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
    return free is None or free > _count_copied_bytes(model, device)


def _count_copied_bytes(model: Any, device: torch.device) -> float:
    """The memory that copies of the model's weights for decoding may take."""
    factor = CPU_MEMORY_FACTOR if device.type == "cpu" else GPU_MEMORY_FACTOR
    return float(factor * sum(p.numel() * p.element_size() for p in model.parameters()))


def _verify_decoding(decoder: Decoder, ids: Tensor, wanted: Tensor) -> Tensor:
    """Prefill and decode the probe in two rows, one of them padded, and refuse a model whose logits differ.

    Gives the logits that were compared, as of `decode_probe`.
    """
    try:
        found = decode_probe(decoder, ids[0].tolist())
    except Exception as error:  # foreign code, called in a way that it may not know
        if is_out_of_memory(error):
            raise
        name = type(decoder.model).__name__
        raise UnsupportedModelError(f"{name} cannot be decoded row by row: {describe_error(error)}") from error
    wanted = wanted[-len(found) :]
    if not is_close(found, wanted, WHOLE_MODEL):
        apart = relative_error(found, wanted)
        raise UnsupportedModelError(f"{type(decoder.model).__name__} gives other scores row by row, {apart:.1%} apart")
    return found


def _add_stack(decoder: Decoder, tokens: list[int], by_modules: Tensor) -> Decoder:
    """The decoder with its own forward pass through the layers; UnknownLayerError if its modules' logits differ."""
    faster = replace(decoder, stack=build_stack(decoder.model, decoder.windows))
    try:
        found = decode_probe(faster, tokens)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise_out_of_memory(error)
        raise UnknownLayerError(f"its parts are called in another way ({describe_error(error)})") from error
    if not is_close(found, by_modules, STACK_ROUNDINGS):
        raise UnknownLayerError("it computes more than its parts do")
    return faster


def decode_probe(decoder: Decoder, tokens: list[int], adapter: AdapterOfRow | None = None) -> Tensor:
    """Logits after each of the last `DECODED_TOKENS` + 1 tokens, all but the first of them decoded.

    One of those is decoded by itself; the others come as a draft does, where the decoder takes drafts.

    Args:
        adapter: that the probe's row is computed with, beside a row of the base; for a decoder with several.
    """
    count = min(DECODED_TOKENS, len(tokens) - 1)
    start = len(tokens) - count
    prompts = [tokens[:start], tokens[:1]]
    _select_adapters(decoder, [adapter, None])
    first, prompt = prefill(decoder, prompts, NO_PREFIX)
    slots = SlotCache(2, len(tokens) + 1, decoder.windows, decoder.dtype, decoder.device)
    for row, length in enumerate((start, 1)):
        slots.write_prompt(row, prompt, row, 0, length)
    logits = [first[:1]]
    steps = [tokens[start : start + 1], tokens[start + 1 :]] if decoder.stack else [[t] for t in tokens[start:]]
    for step in filter(None, steps):
        positions = slots.open_tokens([len(step), 1])
        ids = torch.tensor([*step, tokens[0]], device=decoder.device)
        _select_adapters(decoder, [*[adapter] * len(step), None])
        logits.append(decoder.compute_logits(ids[:, None], positions[:, None], None, slots)[: len(step)])
        slots.keep_tokens(0, len(step))
        slots.keep_tokens(1, 1)
    return torch.cat(logits)


def _select_adapters(decoder: Decoder, rows: Sequence[AdapterOfRow | None]) -> None:
    if decoder.adapters:
        decoder.adapters.select_rows(rows)
