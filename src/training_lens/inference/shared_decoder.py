"""One decoder for a base and several adapters: each row of a batch is computed with the adapter that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from training_lens.inference.decode_loop import Decoder
from training_lens.inference.decoder import build_decoder, decode_probe
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.row_adapters import AdapterOfRow, LayerFactors, RowAdapters, read_factors
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close, relative_error
from training_lens.utils.resource_errors import raise_out_of_memory


@dataclass(frozen=True)
class AdapterProbe:
    """An adapter's factors, and the logits that the adapted model gives for a prompt, (tokens, vocabulary)."""

    factors: Mapping[str, LayerFactors]
    tokens: Sequence[int]
    logits: Tensor


@torch.inference_mode()
def probe_adapter(adapted: Any, tokens: Sequence[int]) -> AdapterProbe:
    """What a shared decoder needs of a PEFT model. Cost: a pass over the tokens, and copies of the factors.

    Raises:
        UnknownLayerError: the adapter cannot be computed beside the weights of a shared decoder.
    """
    factors = read_factors(adapted)
    ids = torch.tensor([list(tokens)], device=adapted.device)
    return AdapterProbe(factors, list(tokens), adapted(input_ids=ids, use_cache=False).logits[0])


@torch.inference_mode()
def build_shared_decoder(
    base: Any, tokens: Sequence[int], probes: Mapping[str, AdapterProbe]
) -> tuple[Decoder, dict[str, str]]:
    """A decoder of the base that computes each adapter, and why it cannot compute others, by their names.

    It gave the logits of the adapted model for each adapter that it has, in a batch with a row of the base alone.

    Raises:
        UnsupportedModelError: the decode loop cannot run the base.
    """
    decoder = build_decoder(base, True, torch.tensor([list(tokens)], device=base.device))
    refusals: dict[str, str] = {}
    kept: dict[str, Mapping[str, LayerFactors]] = {}
    for name, probe in probes.items():
        if reason := _find_fault(decoder, name, probe):
            refusals[name] = reason
        else:
            kept[name] = probe.factors
    if not kept:
        return decoder, refusals
    return replace(decoder, adapters=RowAdapters(decoder.model, decoder.paths, kept)), refusals


def _find_fault(decoder: Decoder, name: str, probe: AdapterProbe) -> str:
    """Why a decoder cannot compute an adapter beside its weights; empty if it can."""
    try:
        adapters = RowAdapters(decoder.model, decoder.paths, {name: probe.factors})
    except UnknownLayerError as reason:
        return str(reason)
    try:
        found = decode_probe(replace(decoder, adapters=adapters), list(probe.tokens), AdapterOfRow(name))
    except (UnknownLayerError, RuntimeError) as error:
        raise_out_of_memory(error)
        return str(error)
    finally:
        adapters.remove()
    wanted = probe.logits[-len(found) :]
    if is_close(found, wanted, WHOLE_MODEL):
        return ""
    return f"its logits beside the weights are {relative_error(found, wanted):.1%} apart from its own"
