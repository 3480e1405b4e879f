"""Checks of the validation rows against the training rows: leaks, domains too small, and another kind of rows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.columns import count_by_example, mask_first_tokens
from training_lens.data.leaks import LEAK_KINDS, LEAK_TEXTS, SplitLeaks, find_leaks
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import DatasetError
from training_lens.training.preflight.row_scan import RowScan

LEAKED, NEAR = 0.01, 0.05
FEWEST_ROWS = 10  # of a domain, for a mean loss with an error bar
DISTANCE, SIGNIFICANCE = 0.3, 1e-4
COMPARED_ROWS = 20  # of either side, at least
SAMPLED_ROWS = 4000

LEAKS = Rule(
    code="leaks",
    signature="validation rows that are training rows, too: equal, equal but for case, punctuation or leading words, "
    "with the same question, or nearly the same; each row counts once, as its strongest kind",
    threshold=f"{LEAKED:.0%} of the validation rows, of those nearly the same {NEAR:.0%}; a set that leaks in whole is "
    "refused",
    source="exact counts; near rows share 80% of their 5-token pieces (Broder 1997)",
    action="training-lens prepare prepare.leakage=remove takes them out of the training rows",
)
DOMAINS = Rule(
    code="small_domains",
    signature="a domain of the training rows with too few validation rows to measure its loss",
    threshold=f"{FEWEST_ROWS} validation rows",
    source="the standard error of a mean of so few rows is near their scatter itself; relative to the run",
    action="give more validation rows of it; training-lens prepare prepare.split_by=domain gives each its share",
)
UNLIKE = Rule(
    code="validation_unlike",
    signature="validation rows that differ from the training rows in length, domain or words",
    threshold=f"a Kolmogorov-Smirnov distance of {DISTANCE:g} with p below {SIGNIFICANCE:g}, or as large a share of "
    "rows in other domains",
    source="two-sample Kolmogorov-Smirnov test, asymptotic p (Massey 1951); relative to the run",
    action="if this is meant, read the validation loss as one on other data; else hold rows out of the same source: "
    "data.val_ratio=0.1",
)


def check_leaks(train: RowScan, validation: RowScan) -> Finding:
    """How many validation rows leak, by kind.

    Raises:
        DatasetError: all validation rows are training rows.
    """
    leaks = find_leaks(train.dataset, validation.dataset)
    rows, leaked, near = len(leaks.kinds), int(leaks.is_leaked.sum()), leaks.counts["near"]
    if rows and leaks.counts["exact"] + leaks.counts["normalized"] == rows:
        raise DatasetError(
            f"data.validation: all {rows} validation examples are training examples too ({leaks.describe()}), so it "
            "would say nothing of new ones. Give other rows, or data.val_ratio to hold some out."
        )
    evidence: dict[str, Any] = {"rows": leaked, "of": rows, **leaks.counts}
    if not leaked:
        return LEAKS.report_fine("No validation row is a training row", f"{rows:,} validation rows", evidence=evidence)
    shown = _show_leaks(leaks, train, validation)
    named = "; ".join(f"{each['row']} and {each['other']} ({each['kind']}): {each['learned']!r}" for each in shown)
    return LEAKS.report_symptom(
        "warning" if leaked - near >= LEAKED * rows or near >= NEAR * rows else "note",
        "Validation rows are in the training rows",
        f"{leaked:,} of {rows:,} validation rows ({leaked / rows:.1%}): {leaks.describe()}. Such as {named}",
        confidence="sure" if leaked > near else "likely",
        evidence={**evidence, "examples": shown},
    )


def _show_leaks(leaks: SplitLeaks, train: RowScan, validation: RowScan) -> list[dict[str, str]]:
    """One validation row of each kind, with the training row that it repeats."""
    shown = []
    for index, kind in enumerate(LEAK_KINDS):
        for position in np.flatnonzero(leaks.kinds == index)[:1].tolist():
            other = train.dataset.example_id(int(leaks.partners[position]))
            shown.append(validation.show_row(position) | {"other": other, "kind": LEAK_TEXTS[kind]})
    return shown


def check_domains(train: TokenDataset, validation: TokenDataset) -> Finding | None:
    """Whether every domain of the training rows has enough validation rows; None without several domains."""
    learned, held = (Counter(d for d in each.domains.tolist() if d is not None) for each in (train, validation))
    if len(learned) < 2:
        return None
    small = {name: held[name] for name in learned if held[name] < FEWEST_ROWS}
    measured = f"{len(learned)} domains, the smallest with {min(held[name] for name in learned)} validation rows"
    if not small:
        return DOMAINS.report_fine("Every domain can be measured", measured)
    named = ", ".join(f"{name} ({count})" for name, count in sorted(small.items(), key=lambda item: item[1])[:8])
    share = sum(learned[name] for name in small) / learned.total()
    return DOMAINS.report_symptom(
        "warning" if share >= LEAKED else "note",
        "Domains with too few validation rows",
        f"{len(small)} of {len(learned)} domains, with {share:.0%} of the training rows: {named}",
        confidence="sure",
        evidence={"domains": small, "share": share},
    )


@dataclass(frozen=True)
class SampleDistance:
    """The Kolmogorov-Smirnov distance of two samples, 0 to 1, and the chance of one as large if they were alike."""

    distance: float
    p: float

    @property
    def is_large(self) -> bool:
        return self.distance >= DISTANCE and self.p < SIGNIFICANCE


def compare_samples(a: np.ndarray, b: np.ndarray) -> SampleDistance:
    """The two-sample Kolmogorov-Smirnov test: max abs(F_a - F_b), and its asymptotic p = 2 exp(-2 D^2 nm/(n + m)).

    Example:
        >>> compare_samples(np.arange(50), np.arange(50) + 50)
        SampleDistance(distance=1.0, p=3.857499695927836e-22)
    """
    values = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (a, b)]
    distance = float(np.abs(shares[0] - shares[1]).max())
    scale = len(a) * len(b) / (len(a) + len(b))
    return SampleDistance(distance, min(1.0, 2 * math.exp(-2 * distance**2 * scale)))


def check_resemblance(train: RowScan, validation: RowScan) -> Finding:
    """Whether validation rows are of the kind of the training rows: lengths, words and domains."""
    sides = [s.dataset.select(s.dataset.spread_positions(SAMPLED_ROWS)) for s in (train, validation)]
    if min(map(len, sides)) < COMPARED_ROWS:
        return UNLIKE.report_inconclusive(
            "Too few rows to compare training and validation",
            f"{len(sides[0])} and {len(sides[1])} rows",
            f"{COMPARED_ROWS} rows of each",
        )
    found = {
        "tokens of an example": compare_samples(*(side.lengths for side in sides)),
        "tokens of an answer": compare_samples(*(side.supervised_counts for side in sides)),
        "words of the answers": compare_samples(*_measure_surprisals(train, *sides)),
    }
    domains = _compare_domains(train.dataset, validation.dataset)
    measured = "; ".join(f"{name}: distance {each.distance:.2f}" for name, each in found.items())
    measured += f"; domains: {domains:.0%} of the rows" if domains is not None else ""
    evidence = {name: [each.distance, each.p] for name, each in found.items()} | {"domains": domains}
    unlike = [name for name, each in found.items() if each.is_large]
    unlike += ["domains"] if (domains or 0.0) >= DISTANCE else []
    if not unlike:
        return UNLIKE.report_fine("Validation rows are like training rows", measured, "likely", evidence)
    return UNLIKE.report_symptom(
        "warning",
        "Validation rows are unlike training rows",
        f"different in {', '.join(unlike)}: {measured}; mean tokens of an example "
        f"{sides[0].lengths.mean():.0f} and {sides[1].lengths.mean():.0f}",
        evidence=evidence,
    )


def _measure_surprisals(scan: RowScan, train: TokenDataset, validation: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
    """The mean surprisal of each row's targets, in nats, under the token counts of other training rows.

    A random half of the training rows gives the counts (add-one smoothing), the other is compared with validation, so
    that both sides are new to the counts.
    """
    places = np.random.Generator(np.random.PCG64(0)).permutation(len(train))
    counts = np.ones(len(scan.targets))
    for _, chunk in train.select(np.sort(places[::2])).iterate_columns():
        counts += np.bincount(chunk.input_ids[mask_first_tokens(chunk.response, chunk.offsets)], minlength=len(counts))
    surprisal = -np.log(counts / counts.sum())
    return _mean_over_targets(train.select(np.sort(places[1::2])), surprisal), _mean_over_targets(validation, surprisal)


def _mean_over_targets(dataset: TokenDataset, values: np.ndarray) -> np.ndarray:
    """The mean of `values` (vocabulary,) over the targets of each row; (rows,) float64."""
    means = np.zeros(len(dataset))
    for positions, chunk in dataset.iterate_columns():
        taught = mask_first_tokens(chunk.response, chunk.offsets)
        sums = np.add.reduceat(np.where(taught, values[chunk.input_ids], 0.0), chunk.offsets[:-1])
        means[positions] = sums / np.maximum(1, count_by_example(taught, chunk.offsets))
    return means


def _compare_domains(train: TokenDataset, validation: TokenDataset) -> float | None:
    """The total variation distance of the shares of domains, 0 to 1; None where no row has a domain."""
    sides = [Counter(dataset.domains.tolist()) for dataset in (train, validation)]
    names = {*sides[0], *sides[1]}
    if names == {None}:
        return None
    shares = [[side[name] / side.total() for side in sides] for name in names]
    return sum(abs(a - b) for a, b in shares) / 2
