"""Which training rows made an answer, as sentences and tables."""

from __future__ import annotations

from collections.abc import Iterator

from training_lens.analysis.explanations.row_evidence import AnswerRows, RankedRow
from training_lens.analysis.explanations.training_rows import label_rows
from training_lens.display.html import BulletList, Callout, Part, Table
from training_lens.utils.formatting import pluralize

SHOWN_CHARACTERS = 160  # of a row's prompt and of its answer in a table; the JSON has them whole
HOW = (
    "A score says how a row looks, and not what it did: only a replay of the run without rows measures that. It is "
    "LESS (arXiv 2402.04333) with the run's own Adam moments."
)
MOST_VERIFIED = 10  # rows that the advice leaves out


def build_row_parts(found: AnswerRows) -> list[Part]:
    """The section of a page without its heading: what was measured, the ranking, how."""
    parts: list[Part] = [_check_callout(found), BulletList(list(describe_rows(found)))]
    return [*parts, ranking_table(found), f"{HOW} {_describe_states(found)}"]


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
            f"Linear datamodeling score: {correlation.rho:+.2f} (95 %: {correlation.low:+.2f} to "
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
    cells = [[label[row.id], *_cells(row), _shorten(row.prompt), _shorten(row.answer)] for row in found.ranking]
    return Table(f"the highest scores: {found.detail}", columns, cells)


def _cells(row: RankedRow) -> list[str]:
    return [f"{row.score:.4g}", str(row.first_step), str(row.supervised_tokens)]


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
