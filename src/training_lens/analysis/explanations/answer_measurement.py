"""Why one answer changed, measured: log-probabilities by token, the logit lens by layer, shares by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

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
from training_lens.analysis.explanations.layer_lens import AnswerLens, find_parting, read_answer_lens
from training_lens.analysis.explanations.loss_path import LossPath
from training_lens.analyzers.module_groups import OUTSIDE
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.core.modules import layer_and_kind
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session
from training_lens.measures.integrated_gradients import POINTS
from training_lens.runs.run_folder import RunFolder


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
