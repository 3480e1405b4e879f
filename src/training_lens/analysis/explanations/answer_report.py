"""Why one answer changed, and which training rows made it, as sentences, pictures, tables and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from training_lens.analysis.explanations.answer_changes import AnswerChange, ModuleEffect, TokenChange, TokenModules
from training_lens.analysis.explanations.row_evidence import AnswerRows
from training_lens.analysis.explanations.training_rows import label_rows
from training_lens.analysis.reports.report_files import Report
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Callout, Part, ShadedText, ShadedToken, SvgPicture, Table
from training_lens.display.svg import Curve, render_chart, render_heat_map
from training_lens.measures.integrated_gradients import TOLERANCE
from training_lens.utils.formatting import cut_text, format_share, pluralize

BLUE, RED = COLOURS[:2]
SOURCES = {"greedy": "the adapter's own (greedy)", "given": "given", "row": "the row's"}
HOW = (
    "Log-probabilities are in nats, of each token given the prompt and the answer's tokens before it, under the base "
    "and under the adapter. The logit lens reads each layer's output through the final norm and the output layer, as "
    "if no layer came after; it is not calibrated in early layers, so only the two models are compared by it. A "
    "module's share is the integral of the derivative of -log p by a multiplier on its update, from 0, the base, to "
    "1, the adapter (integrated gradients, arXiv 1703.01365); shares sum to the change. Below 0 a module makes the "
    "token likelier."
)
SHOWN_CHARACTERS = 160  # of a row's prompt and of its answer in a table; the JSON has them whole
HOW_ROWS = (
    "A score says how a row looks, and not what it did: only a replay of the run without rows measures that. It is "
    "LESS (arXiv 2402.04333) with the run's own Adam moments."
)
MOST_VERIFIED = 10  # rows that the advice leaves out


def build_answer_report(change: AnswerChange, rows: Sequence[Part] = ()) -> Report:
    """The page: both answers, the shaded tokens, layers, modules, and the training rows that made it.

    Args:
        rows: what is known about the training rows, as parts of the page.
    """
    parts: list[Part] = [BulletList(list(describe_answer(change))), answers_table(change), shade_tokens(change)]
    parts += ["# Where base and adapter part", *_draw_layers(change)]
    parts += ["# Which modules made it", *_describe_checks(change), _draw_modules(change)]
    parts += [group_table(change, "layer"), group_table(change, "type")]
    if rows:
        parts += ["# Which training rows made it", *rows]
    parts += ["# Every token", token_table(change), "# How it was measured", f"{HOW} {_describe_cost(change)}"]
    return Report(
        "explain-answer",
        "Why one answer changed",
        (*parts, *change.notes),
        {**change.as_json(), "sentences": [*describe_answer(change)]},
    )


def _describe_cost(change: AnswerChange) -> str:
    return (
        f"{change.length} tokens; {change.gradient_passes} forward and backward passes, {change.passes} forward passes."
    )


def describe_answer(change: AnswerChange) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    before, after = (sum(getattr(token, name) for token in change.tokens) for name in ("base_logp", "adapter_logp"))
    yield (
        f"The answer is {SOURCES[change.source]}, {len(change.tokens)} tokens. The adapter changes its log-probability "
        f"by {change.change:+.2f} nats, from {before:.2f} to {after:.2f}."
    )
    token = change.tokens[change.token]
    yield (
        f"Token {change.token + 1}, {token.text!r}, changes by {token.change:+.2f}, from {token.base_logp:.2f} "
        f"to {token.adapter_logp:.2f}. There the base holds {token.base_top!r} likeliest, the adapter "
        f"{token.adapter_top!r}."
    )
    if change.layers and change.layers.parts_at is not None:
        last = len(change.layers.layers) - 1
        yield (
            f"By the logit lens base and adapter part at layer {change.layers.parts_at} of 0 to {last}: from there on "
            "their divergence stays above half of the last layer's."
        )
    elif change.layers:
        yield "By the logit lens base and adapter do not part: the last layer predicts the same."
    if change.at_token.is_complete and change.at_token.change:
        best = max(change.at_token.modules, key=lambda module: abs(module.share))
        yield f"The largest share in token {change.token + 1} has {best.name}: {format_share(best.fraction)}."
    for name in change.cut:
        yield f"The {name}'s own answer was cut at the limit of tokens (inference.max_new_tokens)."


def describe_check(modules: TokenModules) -> str:
    """Whether the shares can be trusted, in one line."""
    what = "the answer" if modules.token is None else f"token {modules.token + 1}"
    measured = f"{what}: the shares sum to the change up to {modules.residual:.2%} of it, at {modules.points} points"
    if modules.is_complete:
        return f"complete, {measured}"
    return f"inconclusive, {measured}; over {TOLERANCE:.0%}, the path bends too much for these shares"


def _describe_checks(change: AnswerChange) -> Iterator[Part]:
    for modules in (change.at_token, change.whole):
        title = describe_check(modules).removeprefix("complete, ")
        yield Callout("fine" if modules.is_complete else "warning", f"{title[:1].upper()}{title[1:]}.")


def answers_table(change: AnswerChange) -> Table:
    """The prompt, and both models' own answers side by side."""
    own = [("base", change.base_answer), ("adapter", change.adapter_answer)] if change.prompt else []
    asked = [("prompt", change.prompt)] if change.prompt else []
    rows = [*asked, *own, *([("explained", change.answer)] if change.source != "greedy" else [])]
    return Table("what each says", ("", "text"), rows)


def shade_tokens(change: AnswerChange) -> ShadedText:
    """The answer, each token shaded by the change of its log-probability."""
    tokens = [
        ShadedToken(
            token.text,
            token.change,
            f"token {i + 1}: {token.change:+.2f} nats, from {token.base_logp:.2f} to {token.adapter_logp:.2f}",
            i == change.token,
        )
        for i, token in enumerate(change.tokens)
    ]
    caption = (
        f"log p of each token, adapter less base: blue is likelier with the adapter, orange less; framed: token "
        f"{change.token + 1}"
    )
    return ShadedText(caption, tokens)


def token_table(change: AnswerChange, most: int | None = None) -> Table:
    """A row for each token, or for so many of the largest change."""
    ranked = sorted(range(len(change.tokens)), key=lambda i: -abs(change.tokens[i].change))
    shown, caption = sorted(ranked[:most]), "teacher-forced on the same tokens, nats"
    if len(shown) < len(change.tokens):
        caption += f"; the {len(shown)} largest changes of {len(change.tokens)} tokens"
    columns = (
        "token",
        "text",
        "base log p",
        "adapter log p",
        "change",
        "KL",
        "base's likeliest",
        "adapter's likeliest",
    )
    return Table(caption, columns, [_describe_token(i, change.tokens[i]) for i in shown])


def _describe_token(place: int, token: TokenChange) -> list[str]:
    numbers = [f"{token.base_logp:.3f}", f"{token.adapter_logp:.3f}", f"{token.change:+.3f}", f"{token.kl:.3f}"]
    return [str(place + 1), repr(token.text), *numbers, repr(token.base_top), repr(token.adapter_top)]


def _draw_layers(change: AnswerChange) -> Iterator[Part]:
    if change.layers is None:
        yield "inconclusive: this model has no logit lens."
        return
    rows, at = change.layers.layers, f"at token {change.token + 1}"
    layers = np.array([row.layer for row in rows], float)

    def curve(name: str, field: str, colour: str, dashed: bool = False) -> Curve:
        return Curve(name, layers, np.array([getattr(row, field) for row in rows]), colour, dots=True, dashed=dashed)

    divergences = [curve("mean over the answer", "kl", BLUE), curve(at, "token_kl", RED, dashed=True)]
    caption = "KL from the base's lens to the adapter's at each layer's output."
    if change.layers.parts_at is not None:
        caption += f" The mean stays above half of the last layer's from layer {change.layers.parts_at} on."
    yield SvgPicture(render_chart(divergences, "layer", "KL, nats"), caption)
    lenses = [curve(f"base, {at}", "base_logp", BLUE, dashed=True), curve(f"adapter, {at}", "adapter_logp", RED)]
    caption = f"What each layer's lens gives the token {change.tokens[change.token].text!r}."
    yield SvgPicture(render_chart(lenses, "layer", "log p, nats"), caption)


def _draw_modules(change: AnswerChange) -> SvgPicture:
    modules = change.at_token.modules
    layers, kinds = _list_groups(modules, "layer"), _list_groups(modules, "type")
    values = np.full((len(layers), len(kinds)), np.nan)
    for module in modules:
        place = layers.index(module.layer_name), kinds.index(module.kind)
        values[place] = np.nan_to_num(values[place]) + module.share
    svg = render_heat_map(layers, kinds, values, "{:+.2f}", "layer {}, {}: {} nats")
    return SvgPicture(svg, f"Shares in the change of -log p at token {change.token + 1}, nats; blue makes it likelier.")


def group_table(change: AnswerChange, by: str) -> Table:
    """Shares by layer or type of module: at the token, and over the whole answer."""
    groups, key = _list_groups(change.at_token.modules, by), _group_key(by)
    rows = []
    for name in groups:
        row = [name]
        for part in (change.at_token, change.whole):
            share = sum(module.share for module in part.modules if key(module) == name)
            row += [f"{share:+.4f}", format_share(share / part.change if part.change else None)]
        rows.append(row)
    columns = (by, f"token {change.token + 1}", "of change", "answer", "of change")
    return Table(f"change of -log p by {'layer' if by == 'layer' else 'type of module'}, nats", columns, rows)


def _group_key(by: str) -> Callable[[ModuleEffect], str]:
    return (lambda module: module.layer_name) if by == "layer" else (lambda module: module.kind)


def _list_groups(modules: Sequence[ModuleEffect], by: str) -> list[str]:
    """The layers by number, then those outside of them; or the types as they come."""
    names = list(dict.fromkeys(map(_group_key(by), modules)))
    if by != "layer":
        return names
    return [*sorted(filter(str.isdigit, names), key=int), *(name for name in names if not name.isdigit())]


def build_row_parts(found: AnswerRows) -> list[Part]:
    """The section of a page without its heading: what was measured, the ranking, how."""
    parts: list[Part] = [_check_callout(found), BulletList(list(describe_rows(found)))]
    return [*parts, ranking_table(found), f"{HOW_ROWS} {_describe_states(found)}"]


def describe_rows(found: AnswerRows) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    if check := found.verification:
        count, steps = len(check.rows), f"from step {check.replayed.start} to {check.replayed.end}"
        randoms = ", ".join(f"{change:+.3f}" for change in check.control_changes)
        yield (
            f"Replayed {steps} without the top {pluralize(count, 'row')}, the answer's "
            f"log-probability changes by {check.change:+.3f} nats, from {found.log_probability:.3f}; without {count} "
            f"random rows of like length, {len(check.controls)} times: by {randoms}."
        )
    if score := found.datamodeling:
        correlation = score.correlations[0]
        outcome = (
            "the ranking predicts what replays measure"
            if correlation.is_positive
            else f"inconclusive, as the interval holds 0; --lds {4 * score.subsets} may decide"
        )
        yield (
            f"Linear datamodeling score: {correlation.rho:+.2f} (95%: {correlation.low:+.2f} to "
            f"{correlation.high:+.2f}), the rank correlation of predicted and measured change over {score.subsets} "
            f"replays without a random half of the rows: {outcome}."
        )


def describe_row_check(found: AnswerRows) -> str:
    """Whether the ranking is confirmed, in one line."""
    check = found.verification
    if check is None:
        known = "measured by random subsets alone" if found.datamodeling else "not measured: this is a ranking"
        count = min(MOST_VERIFIED, found.rows // 2)
        return (
            f"{known}. --verify {count} measures it: the run is replayed without the top {pluralize(count, 'row')}, "
            f"and without {count} random of like length"
        )
    if check.is_confirmed:
        return (
            f"measured: without the top {len(check.rows)} rows the answer loses more than without each of "
            f"{len(check.controls)} random sets"
        )
    return (
        f"inconclusive: the answer does not lose more without the top {len(check.rows)} rows than without each of "
        f"{len(check.controls)} random sets. More rows (--verify {2 * len(check.rows)}) would decide, or --lds 16"
    )


def _check_callout(found: AnswerRows) -> Callout:
    title = describe_row_check(found)
    is_confirmed = found.verification is not None and found.verification.is_confirmed
    return Callout("fine" if is_confirmed else "note", f"{title[:1].upper()}{title[1:]}.")


def _describe_states(found: AnswerRows) -> str:
    steps = ", ".join(map(str, found.steps))
    return (
        f"{found.rows} rows were ranked, by gradients at {pluralize(len(found.steps), 'state')}: after steps {steps}."
    )


def ranking_table(found: AnswerRows) -> Table:
    """The rows of the highest scores."""
    columns = ("row", "score", "first step", "tokens", "prompt", "answer")
    label = label_rows(row.id for row in found.ranking)
    cells = []
    for row in found.ranking:
        texts = [cut_text(" ".join(text.split()), SHOWN_CHARACTERS) for text in (row.prompt, row.answer)]
        cells.append([label[row.id], f"{row.score:.4g}", str(row.first_step), str(row.supervised_tokens), *texts])
    return Table(f"the highest scores: {found.detail}", columns, cells)
