"""Why one answer changed, measured: log-probabilities by token, the logit lens by layer, shares by module.

In the lens a layer's states go through the final norm and the output layer, as if no layer came after it
(nostalgebraist 2020, "interpreting GPT: the logit lens"). It is not calibrated in early layers, so only the difference
between base and adapter is read, each through its own norm and output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_lens.analysis.explanations.answer_changes import (
    AnswerChange,
    LayerChange,
    LayerComparison,
    ModuleEffect,
    TokenChange,
    TokenModules,
)
from training_lens.analysis.explanations.answer_question import (
    AnswerQuestion,
    AnswerText,
    build_answer,
    find_row,
    read_pieces,
)
from training_lens.analysis.explanations.loss_path import LossPath
from training_lens.analyzers.module_groups import OUTSIDE
from training_lens.collectors.layer_activations import TokenPositions, decoder_layers, record_states
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.core.modules import layer_and_kind
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session
from training_lens.measures.integrated_gradients import POINTS
from training_lens.models.adapters import base_only
from training_lens.models.model_classes import decoder_of, evaluation_mode, unwrap_adapter
from training_lens.models.token_scores import forward_kl, logits_from_states
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.devices import autocast

POSITIONS_AT_ONCE = 32  # whose logits are in memory together
PARTED = 0.5  # of the last layer's KL: the first layer from which on it stays above is where the models part


@dataclass(frozen=True)
class PredictionPair:
    """What base and adapter predict for some tokens, on the CPU: (tokens,), or (layers, tokens) of a lens.

    `kl` is KL(base || adapter) in nats; the log-probabilities (float64) are those of the token that stands there,
    `base_top` and `adapter_top` (int64) the likeliest ones.
    """

    kl: Tensor
    base_logp: Tensor
    adapter_logp: Tensor
    base_top: Tensor
    adapter_top: Tensor

    @classmethod
    def from_rows(cls, rows: Tensor) -> PredictionPair:
        """From (..., 5, tokens), as `_compare_states` has them."""
        kl, base_logp, adapter_logp, *tops = rows.double().cpu().unbind(-2)
        return cls(kl, base_logp, adapter_logp, *(top.long() for top in tops))


@dataclass(frozen=True)
class AnswerLens:
    """The predictions of base and adapter for an answer's tokens, and those of each layer's lens.

    `layers` is None where the model has no lens, for the `reason`.
    """

    final: PredictionPair
    layers: PredictionPair | None
    reason: str = ""


def find_parting(kl: Tensor) -> int | None:
    """The first layer from which on the mean KL stays above half of the last layer's; None where there is none.

    Args:
        kl: (layers, tokens).

    A threshold of ours: from there on the larger part of the difference is there.
    """
    mean = kl.mean(1)
    if not mean[-1] > 0:
        return None
    below = (mean < PARTED * mean[-1]).nonzero()
    return int(below[-1]) + 1 if len(below) else 0


def read_answer_lens(session: Session, ids: Tensor, places: Tensor) -> AnswerLens:
    """The predictions of base and adapter for the tokens at `places` of one text, and each layer's.

    Args:
        ids: (length,) int64; `places` (tokens,) int64, from 1: a token is predicted from the one before it.

    Cost: two passes of the model, and two of the output layer for each layer and once more.
    """
    model, device = session.model, session.device
    batch, wanted = ids[None].to(device), ids[places].to(device)
    positions = TokenPositions(places.to(device) - 1, (1, len(ids)))
    with torch.inference_mode(), evaluation_mode(model), autocast(device, session.precision):
        with base_only(model):
            base = _read_states(model, batch, positions)
        adapter = _read_states(model, batch, positions)
        final = _compare_states(model, (base.end, adapter.end), base.output, wanted)
        if base.normalize is None or adapter.normalize is None:
            reason = (
                f"the logit lens found no norm after the layers of this {type(unwrap_adapter(model)).__name__}, so its "
                "layers cannot be compared by what they would predict"
            )
            return AnswerLens(PredictionPair.from_rows(final), None, reason)
        layers = []
        for before, after in zip(base.layers, adapter.layers, strict=True):
            with base_only(model):
                normed = base.normalize(before[None])[0]
            pair = normed, adapter.normalize(after[None])[0]
            layers.append(_compare_states(model, pair, base.output, wanted))
    return AnswerLens(PredictionPair.from_rows(final), PredictionPair.from_rows(torch.stack(layers)))


@dataclass(frozen=True)
class _DecoderStates:
    """The states at some positions, (n, hidden): of each layer, and the decoder's own output.

    `normalize` turns the last layer's into that; None if no module of the decoder does.
    """

    layers: list[Tensor]
    end: Tensor
    normalize: Callable[[Tensor], Tensor] | None
    output: type


def _read_states(model: Any, batch: Tensor, positions: TokenPositions) -> _DecoderStates:
    decoder, layers, calls = decoder_of(model), decoder_layers(model), list[tuple[Any, Tensor, Tensor]]()

    def note_call(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, inputs[0], output))

    within = {id(module) for layer in layers for module in layer.modules()} | {id(decoder)}
    handles = [m.register_forward_hook(note_call) for m in decoder.modules() if id(m) not in within]
    try:
        with record_states(layers, positions) as states:
            output = decoder(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    end = positions.select_states(output[0])
    normalize: Callable[[Tensor], Tensor] | None = (lambda x: x) if torch.equal(end, states[-1]) else None
    for module, given, result in calls:
        if given.shape == result.shape == output[0].shape and torch.equal(result, output[0]):
            normalize = module if torch.equal(positions.select_states(given), states[-1]) else normalize
    return _DecoderStates(list(states), end, normalize, type(output))


def _compare_states(model: Any, pair: tuple[Tensor, Tensor], output: type, wanted: Tensor) -> Tensor:
    """(5, tokens) from states before the head: KL, both log-probabilities of the wanted tokens, both likeliest ones."""
    whole, parts = unwrap_adapter(model), []
    chunks = (x.split(POSITIONS_AT_ONCE) for x in (*pair, wanted))
    for before, after, targets in zip(*chunks, strict=True):
        with base_only(model):
            of_base = logits_from_states(whole, before, output)
        of_adapter = logits_from_states(whole, after, output)
        logp = [x.log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (of_base, of_adapter)]
        tops = [x.argmax(-1).to(logp[0].dtype) for x in (of_base, of_adapter)]
        parts.append(torch.stack([forward_kl(of_base, of_adapter), *logp, *tops]))
    return torch.cat(parts, 1)


def explain_answer(
    run: RunFolder | None,
    session: Session,
    question: AnswerQuestion,
    settings: InferenceSection,
    *,
    others: Sequence[str] = (),
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> AnswerChange:
    """Explain what the adapter changed about an answer.

    Args:
        run: that the session is of; None: an adapter without its run.
        settings: of the greedy answers, `max_new_tokens`.
        others: sources of rows that `question` may name, besides those of the run.
        announce: called with the cost in passes and tokens, before they are made.

    Cost: two greedy answers, 6 forward passes, and 16 to 112 forward and backward passes over prompt and answer.

    Raises:
        ConfigurationError: no prompt or an unknown row, no room for the answer, or no such token.
        AdapterError: the adapter has modules that cannot be multiplied.
    """
    question.check()
    token = question.token
    example = find_row(run, session, question.row, others) if question.row is not None else None
    text = build_answer(session, question, example, settings)
    if token is not None and not 0 <= token < len(text.places):
        raise ConfigurationError(f"--token {token + 1}: the answer has {len(text.places)} tokens; count from 1.")
    forward, gradients = f"{2 * POINTS[0]} to {2 * sum(POINTS)}", f"{len(text.ids):,} tokens"
    announce(f"6 forward passes and {forward} forward and backward passes over {gradients}")
    lens = read_answer_lens(session, torch.from_numpy(text.ids), torch.from_numpy(text.places))
    tokens = tuple(_list_tokens(session, text, lens))
    chosen = int(np.argmax([abs(t.change) for t in tokens])) if token is None else token
    progress = progress or Progress()
    whole = _share_tokens(session, text, None, progress)
    at_token = _share_tokens(session, text, chosen, progress)
    generated = {"base": text.base, "adapter": text.adapter}
    return AnswerChange(
        run=str(run.root) if run else session.source,
        prompt=text.prompt,
        row=text.row,
        domain=text.domain,
        answer=text.answer,
        source=text.source,
        base_answer=text.base.text if text.base else "",
        adapter_answer=text.adapter.text if text.adapter else "",
        cut=tuple(name for name, said in generated.items() if said and said.finish_reason == "length"),
        tokens=tokens,
        token=chosen,
        layers=_compare_layers(lens, chosen),
        at_token=at_token,
        whole=whole,
        notes=(lens.reason,) if lens.reason else (),
        passes=6,
        gradient_passes=sum(count for part in (whole, at_token) for count in POINTS if count <= part.points),
        length=len(text.ids),
        ids=tuple(text.ids.tolist()),
        places=tuple(text.places.tolist()),
    )


def _list_tokens(session: Session, text: AnswerText, lens: AnswerLens) -> Iterator[TokenChange]:
    ids, final = text.ids[text.places].tolist(), lens.final
    pieces = read_pieces(session, ids)
    base_top, adapter_top = (
        [str(session.tokenizer.decode([i], skip_special_tokens=False)) for i in tops.tolist()]
        for tops in (final.base_top, final.adapter_top)
    )
    for i, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        base, adapter = float(final.base_logp[i]), float(final.adapter_logp[i])
        change = adapter - base
        yield TokenChange(token, piece, base, adapter, change, base_top[i], adapter_top[i], float(final.kl[i]))


def _compare_layers(lens: AnswerLens, chosen: int) -> LayerComparison | None:
    if lens.layers is None:
        return None
    found = lens.layers
    rows = [
        LayerChange(
            layer,
            float(found.kl[layer].mean()),
            float(found.kl[layer, chosen]),
            float(found.base_logp[layer, chosen]),
            float(found.adapter_logp[layer, chosen]),
        )
        for layer in range(len(found.kl))
    ]
    return LayerComparison(tuple(rows), find_parting(found.kl))


def _share_tokens(session: Session, text: AnswerText, token: int | None, progress: Progress) -> TokenModules:
    """The change of the loss of one token, or of all of the answer, shared out among the modules."""
    mask = np.zeros(len(text.ids), bool)
    mask[text.places if token is None else text.places[token]] = True
    row = TokenizedExample("answer", 1, text.ids.astype(np.int32), mask, None)
    path = LossPath(session, TokenDataset.from_examples([row]), len(text.ids), progress)
    names = path.multipliers.names
    what = "the answer" if token is None else f"token {token + 1}"
    base = path.measure_losses([0.0] * len(names), f"base, {what}")
    change = path.measure_losses([1.0] * len(names), f"adapter, {what}") - base
    shares = path.share_change(change)
    total = float(change.sum())
    return TokenModules(
        token, total, shares.points, shares.residual, shares.is_complete,
        tuple(_list_effects(names, shares.by_row[0], total)),
    )  # fmt: skip


def _list_effects(names: tuple[str, ...], shares: np.ndarray, total: float) -> Iterator[ModuleEffect]:
    for name, share in zip(names, shares.tolist(), strict=True):
        layer, kind = layer_and_kind(name)
        place = OUTSIDE if layer is None else str(layer)
        yield ModuleEffect(name, place, kind, share, share / total if total else None)
