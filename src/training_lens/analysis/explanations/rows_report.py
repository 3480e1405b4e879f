"""The life of training rows as tables, a map of all rows, and a file of the suspects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from training_lens.analysis.explanations.row_explanation import (
    FORGOTTEN,
    LATE,
    NEVER,
    SUSPICIOUS,
    WRONG,
    ListedRow,
    RowsExplanation,
    RowVisits,
)
from training_lens.analysis.explanations.training_rows import label_rows
from training_lens.analysis.reports.report_files import Report
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Part, ShortenedCell, SvgPicture, Table
from training_lens.display.svg import Dots, render_dots
from training_lens.measures.row_life import LEARNED
from training_lens.utils.files import write_text
from training_lens.utils.formatting import pluralize

BLUE, RED, GREEN, PINK, ORANGE = COLOURS[:5]
SHOWN, SHOWN_FAMILIES = 40, 20  # rows of a list, and families, that the page shows; the CSV has all rows
NAMED = 4  # rows of a family
MOST_DOTS = 2000  # of the map: listed rows, and the others evenly
COLUMNS = (
    *("row", "visits", "tokens", "probability", "variability", "log-probability", "its spread", "first loss"),
    *("last loss", "learned at step", "times lost", "score", "base loss", "adapter loss", "gain", "lists"),
)
MEANING = {
    WRONG: "What the run learned from the other rows speaks against these answers. Read them first: rare and hard rows "
    "stand here, too.",
    NEVER: "Below the threshold at every visit.",
    FORGOTTEN: "Above the threshold at one visit, and below it at the last.",
    LATE: "Above the threshold at the last visit alone; another epoch may be worth it where these are many.",
}


def describe_rows(found: RowsExplanation) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    lives, fewest, most = found.lives, int(found.lives.visits.min()), int(found.lives.visits.max())
    visits = f"{fewest} to {most} visits" if fewest < most else pluralize(most, "visit")
    share = f" (one row in {found.visits.every} was recorded)" if found.visits.every > 1 else ""
    rows = f"{len(found.ids):,} training rows{share}, {visits} each"
    suspects = f"{len(found.suspects):,} rows are {WRONG}, by a score of {SUSPICIOUS} and above"
    if most == 1:
        yield f"{rows}: what was learned, forgotten or learned late cannot be seen. A second epoch would decide."
        yield f"{suspects}; each score rests on a single loss."
    else:
        learned = int(lives.is_learned.sum())
        since = f"from a probability of {found.threshold:.2f} per token"
        yield f"{rows}: {learned:,} are learned at their last visit, {since}."
        if found.is_own_median:
            yield (
                f"Few rows reach a probability of {LEARNED:g} per token, so a row counts as learned from the median of "
                "the last visits: half of the rows, by definition."
            )
        others = ", ".join(f"{len(found.lists[name]):,} {name}" for name in (NEVER, FORGOTTEN, LATE))
        yield f"{suspects}; {others}."
    if found.families:
        yield (
            f"{sum(map(len, found.families)):,} rows stand in {len(found.families):,} "
            f"{'family' if len(found.families) == 1 else 'families'} of near repeats, the largest of "
            f"{len(found.families[0])}."
        )
    if found.held_out is not None and found.held_out.losses.shape[1] > 1:
        yield _describe_held_out(found.held_out)
    if found.measured is not None:
        worse = int((found.measured.gain < 0).sum())
        yield (
            f"Measured on these rows now, the base's mean loss is {np.nanmean(found.measured.base):.3f} nats per "
            f"token and the adapter's {np.nanmean(found.measured.adapter):.3f}; on {worse:,} rows the adapter is worse "
            "than its base."
        )


def _describe_held_out(visits: RowVisits) -> str:
    seen = np.isfinite(visits.losses)
    rows = np.flatnonzero(seen.sum(1) > 1)
    first, last = visits.losses[rows, 0], visits.losses[rows, seen.sum(1)[rows] - 1]
    return (
        f"{len(rows):,} validation rows were measured up to {visits.losses.shape[1]} times, from the base on: their "
        f"mean loss went from {first.mean():.3f} to {last.mean():.3f} nats per token, and "
        f"{int((last > first).sum()):,} of them ended worse than by the base."
    )


def held_out_table(visits: RowVisits) -> Table:
    """The validation rows that lost most against the base, or gained least: their losses at the validations."""
    seen = np.isfinite(visits.losses)
    last = visits.losses[np.arange(len(visits.ids)), seen.sum(1) - 1]
    change = last - visits.losses[:, 0]
    label = label_rows(visits.ids)
    lines = [
        [label[visits.ids[i]], f"{visits.losses[i, 0]:.3f}", f"{last[i]:.3f}", f"{change[i]:+.3f}", f"{seen[i].sum()}"]
        for i in np.argsort(-change, kind="stable")[:SHOWN].tolist()
    ]
    caption = "validation rows by the change of their loss in nats per token, the worst first"
    return Table(caption, ["row", "base", "last", "change", "times measured"], lines)


def rows_table(found: RowsExplanation) -> Table:
    """A row for each training row that was recorded."""
    kinds, lives, measured = found.kinds_of(), found.lives, found.measured
    rows = []
    for i, row_id in enumerate(found.ids):
        first = lives.first_learned[i]
        numbers = [lives.confidence[i], lives.variability[i], lives.log_probability[i], lives.spread[i]]
        numbers += [lives.first_loss[i], lives.last_loss[i]]
        row = [row_id, f"{lives.visits[i]}", f"{found.visits.tokens[i]}", *map(_format_number, numbers)]
        row += [
            "-" if first < 0 else f"{found.visits.steps[i, first]}",
            f"{lives.forgotten[i]}",
            _format_number(found.scores[i]),
        ]
        row += (
            [_format_number(v[i]) for v in (measured.base, measured.adapter, measured.gain)] if measured else ["-"] * 3
        )
        rows.append([*row, "; ".join(kinds.get(row_id, []))])
    return Table("every recorded training row", COLUMNS, rows)


def _format_number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "-"


def list_tables(found: RowsExplanation) -> list[Table]:
    """The lists that have rows, the first of each, then the families."""
    tables, label = [], label_rows(found.ids)
    for name, rows in found.lists.items():
        if rows:
            shown = f", the first {SHOWN}" if len(rows) > SHOWN else ""
            lines = [[label[row.id], row.reason, row.prompt, row.answer] for row in rows[:SHOWN]]
            caption = f"{name}: {len(rows):,} rows{shown}. {MEANING[name]}"
            tables.append(Table(caption, ["row", "why", "prompt", "answer"], lines))
    if found.families:
        caption = f"near repeats: {len(found.families):,} families of rows that share 80% of their 5-token pieces"
        lines = [_describe_family(family, found, label) for family in found.families[:SHOWN_FAMILIES]]
        tables.append(Table(caption, ["rows", "size", "prompt of the first", "answer"], lines))
    return tables


def _describe_family(family: Sequence[str], found: RowsExplanation, label: Mapping[str, ShortenedCell]) -> list[str]:
    more = f" and {len(family) - NAMED} more" if len(family) > NAMED else ""
    whole, short = (
        ", ".join(names) + more for names in zip(*((i, label[i].short) for i in family[:NAMED]), strict=True)
    )
    return [ShortenedCell(whole, short), f"{len(family)}", *found.texts(family[0])]


def draw_map(found: RowsExplanation) -> SvgPicture:
    """Every row as a dot, the mean probability per token against its spread over visits; hovering shows the row."""
    lives, names = found.lives, found.kinds_of()
    is_single = float(np.median(lives.visits)) == 1  # canaries come several times an epoch
    x = found.visits.steps[:, 0].astype(float) if is_single else np.nan_to_num(lives.variability)
    kinds = np.array([names.get(row_id, [""])[0] for row_id in found.ids])
    others = np.flatnonzero(kinds == "")
    room = min(len(others), max(0, MOST_DOTS - int((kinds != "").sum())))
    others = others[np.unique(np.linspace(0, len(others) - 1, room).astype(int))] if room else others[:0]
    groups = [("other rows", others, BLUE)]
    for name, colour in ((LATE, GREEN), (NEVER, ORANGE), (FORGOTTEN, PINK), (WRONG, RED)):
        groups.append((name, np.flatnonzero(kinds == name)[:MOST_DOTS], colour))
    dots = [
        Dots(f"{name} ({len(at):,})", x[at], lives.confidence[at], [_describe_dot(found, int(i)) for i in at], colour)
        for name, at, colour in groups
    ]
    left = len(found.ids) - sum(len(at) for _, at, _ in groups)
    return SvgPicture(
        render_dots(
            dots,
            "step of its first visit" if is_single else "variability: standard deviation over visits",
            "probability per token",
        ),
        "Each dot is a training row; hover over it to see the row. "
        + (
            "Far below the other dots of its step: a row that the others do not explain."
            if is_single
            else "High and left: easy from the start. Right: learned on the way. Low and left: never explained by the "
            "others, where wrong answers gather."
        )
        + (f" {left:,} rows are not drawn." if left else ""),
    )


def _describe_dot(found: RowsExplanation, i: int) -> str:
    prompt, answer = found.texts(found.ids[i])
    losses = found.visits.losses[i][: found.lives.visits[i]]
    return f"{found.ids[i]}\nloss {' '.join(f'{loss:.2f}' for loss in losses[:12])}\n{prompt}\n→ {answer}"


def build_rows_report(found: RowsExplanation, notes: Sequence[str] = ()) -> Report:
    """The page: what was found, the map, the lists, and how it was measured."""
    parts: list[Part] = [BulletList([*describe_rows(found), *notes]), "# The map", draw_map(found)]
    parts += ["# Rows to look at", *list_tables(found)]
    if found.held_out is not None and found.held_out.losses.shape[1] > 1:
        parts += ["# Validation rows", held_out_table(found.held_out)]
    parts += ["# How it was measured", HOW]
    return Report(
        "explain-rows",
        "The life of each training row",
        tuple(parts),
        {**found.as_json(), "sentences": [*describe_rows(found), *notes]},
    )


HOW = (
    "The losses are those that the training computed at each visit anyway, before the step's update, in nats per "
    "supervised token; no pass was added. Probability is the mean over visits of exp(-loss per token), variability its "
    "standard deviation (arXiv 2009.10795); a row is forgotten where it was learned at one visit and not at the next "
    "(arXiv 1812.05159). The score is the mean loss after the first visit above the usual one at that step, in robust "
    "standard deviations over rows of like length: how well it finds wrong answers is in docs/lens/explain.md."
)


def write_suspects(path: Path, rows: Sequence[ListedRow]) -> None:
    """Write the rows' ids, one a line with the reason behind a tab, as `data.exclude` reads them."""
    head = "# Likely mislabelled rows, by training-lens explain rows. Read them, take out the lines of rows that are\n"
    head += "# right, and train without the others: data.exclude=THIS_FILE\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + "".join(f"{row.id}\t{row.reason}\n" for row in rows), verbatim=True)
