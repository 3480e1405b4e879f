"""What an adapter remembers, as tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from training_lens.analysis.explanations.memory_measurement import (
    CHOSEN,
    TRAINED,
    UNSEEN,
    Continuation,
    MemoryExplanation,
)
from training_lens.analysis.explanations.training_rows import label_rows
from training_lens.analysis.reports.report_files import Report
from training_lens.display.colors import COLOURS
from training_lens.display.html import BulletList, Part, SvgPicture, Table
from training_lens.display.svg import Dots, render_dots
from training_lens.measures.curves import NORMAL_95
from training_lens.measures.exposure import chance_of_exposure

BLUE, RED, GREEN = COLOURS[:3]
SHOWN = 20  # rows of a list
RARE = 0.025  # what exceeds chance: the upper tail of a 95 % interval
CAVEAT = "A low number is no proof of privacy: other rows, prompts and ways of asking were not tried."
HOW = (
    "Exposure is log2 |R| - log2 rank, in bits: the rank of a row's loss among those of |R| candidates of the same "
    "form (arXiv 1802.08232). A canary's code is drawn from the same candidates, so a model that never saw it gives "
    "each rank with equal chance. The candidates of a chosen row are its own prompt with the answers of rows of like "
    "length, by loss per token; a right answer may rank first without having been seen, so the base's exposure stands "
    "beside it. A continuation is exact where each next token is the one that greedy decoding picks."
)


def describe_memory(found: MemoryExplanation) -> Iterator[str]:
    """What the numbers say, a sentence each."""
    groups = found.list_repeats()
    for repeats, exposures in groups.items():
        mean, count = float(np.mean(exposures)), len(exposures)
        chance = chance_of_exposure(mean, count)
        verdict = "above chance" if chance <= RARE else "indistinguishable from chance"
        what = f"visited {_count_visits(repeats)} an epoch" if repeats else "never planted"
        named, reach = ("canary", "one reaches") if count == 1 else ("canaries", f"{count} reach")
        yield (
            f"{count} {named} {what}: mean exposure {mean:.2f} of {math.log2(found.candidates):.2f} bits, {verdict}: "
            f"unseen ones average {found.chance:.2f}, and {reach} {mean:.2f} with a probability of at most "
            f"{chance:.2g}."
        )
    trained, unseen = found.find_group(TRAINED), found.find_group(UNSEEN)
    if trained:
        yield f"{TRAINED.capitalize()}: {_describe_group(trained)}"
    if unseen:
        yield f"{UNSEEN.capitalize()}: {_describe_group(unseen)}"
    if len(trained) > 1 and len(unseen) > 1:
        yield _compare_groups(trained, unseen)
    yield CAVEAT


def _count_visits(repeats: int) -> str:
    return "never" if repeats == 0 else "once" if repeats == 1 else f"{repeats} times"


def _describe_group(rows: Sequence[Continuation]) -> str:
    whole = sum(row.longest == row.tokens for row in rows)
    own, base = (np.mean([getattr(row, name) for row in rows]) for name in ("longest", "base"))
    return (
        f"{whole} of {len(rows)} are repeated whole; the longest exact continuation is "
        f"{max(row.longest for row in rows)} tokens, {own:.1f} on average ({base:.1f} by the base)."
    )


def _compare_groups(trained: Sequence[Continuation], unseen: Sequence[Continuation]) -> str:
    """Whether training rows are continued further than unseen ones, by Welch's interval on the share of a row."""
    one, other = (np.array([row.share for row in rows]) for rows in (trained, unseen))
    difference = float(one.mean() - other.mean())
    half = NORMAL_95 * math.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    verdict = (
        "Training rows are continued further than unseen ones"
        if difference > half
        else "Training rows cannot be distinguished from unseen ones by their continuations"
    )
    return (
        f"{verdict}: by the longest continuation as a share of the row, training rows less unseen ones, they differ by "
        f"{difference:+.1%} (95%: {difference - half:+.1%} to {difference + half:+.1%})."
    )


def exposure_table(found: MemoryExplanation) -> Table:
    """A row for each canary and each chosen row."""
    rows, label = [], label_rows(row.id for row in found.exposures)
    for row in found.exposures:
        kind = CHOSEN if row.repeats is None else _count_visits(row.repeats)
        base = "-" if row.base_exposure is None else f"{row.base_exposure:.2f}"
        rows.append([label[row.id], kind, f"{row.exposure:.2f}", base, row.prompt, row.answer])
    caption = (
        f"exposure in bits, by the adapter and by its base, of at most {math.log2(found.candidates):.2f}; unseen "
        f"canaries average {found.chance:.2f}"
    )
    return Table(caption, ["row", "visited", "exposure", "base", "prompt", "answer"], rows)


def continuation_table(found: MemoryExplanation) -> Table:
    """A row for each row that was continued, the longest first."""
    rows = sorted(found.continuations, key=lambda row: -row.longest)
    label = label_rows(row.id for row in rows)
    lines = [
        [
            label[row.id],
            row.group,
            f"{row.tokens}",
            f"{row.leading}",
            f"{row.longest}",
            f"{row.base}",
            row.prefix,
            row.text,
        ]
        for row in rows
    ]
    columns = [
        "row",
        "group",
        "tokens",
        "from its start",
        "longest",
        "longest of the base",
        "after",
        "continued exactly",
    ]
    return Table("exact greedy continuations, in tokens; the longest first", columns, lines)


def build_memory_report(found: MemoryExplanation) -> Report:
    """The page: what was found, the picture, the tables, and how it was measured."""
    parts: list[Part] = [BulletList([*describe_memory(found), *found.notes])]
    if found.exposures:
        parts += ["# Exposure", *_draw_exposures(found), exposure_table(found)]
    if found.continuations:
        whole = continuation_table(found)
        caption = whole.caption + (f"; the first {SHOWN}" if len(whole.rows) > SHOWN else "")
        parts += ["# Continuations", Table(caption, whole.columns, whole.rows[:SHOWN])]
    parts += ["# How it was measured", HOW]
    return Report(
        "explain-memory",
        "What the adapter remembers of its rows",
        tuple(parts),
        {**found.as_json(), "sentences": [*describe_memory(found)]},
    )


def _draw_exposures(found: MemoryExplanation) -> Iterator[SvgPicture]:
    """The exposure of each canary against its visits, on a logarithmic axis with the unplanted at the left."""
    groups = found.list_repeats()
    if not groups:
        return
    x = np.concatenate(
        [np.full(len(values), math.log2(repeats) if repeats else -1.0) for repeats, values in groups.items()]
    )
    y = np.concatenate([np.array(values) for values in groups.values()])
    rows = [row for repeats in groups for row in found.exposures if row.repeats == repeats]
    titles = [f"{row.id}, {_count_visits(row.repeats or 0)}\n{row.prompt}\n→ {row.answer}" for row in rows]
    chance = Dots("chance level", x, np.full(len(x), found.chance), ["chance level"] * len(x), GREEN)
    yield SvgPicture(
        render_dots(
            [chance, Dots("canaries", x, y, titles, RED)], "log2 of visits an epoch (-1: never planted)", "bits"
        ),
        "The exposure of each canary; hover over a dot to see it. The mean of those never planted is the chance level.",
    )
