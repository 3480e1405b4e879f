"""The life of a training row: its losses at each visit, what they say of how it was learned, and when it was lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training_lens.measures.curves import MAD_TO_DEVIATION

LEARNED = 0.5  # probability per token, above which greedy decoding picks a token whatever the others have
LEAST_LEARNED = 0.2  # share of rows that must reach it at their last visit, else the threshold is their median
TREND_VISITS = 32  # whose median is the usual loss of a step
LEAST_GROUP = 200  # rows of like length that a row is compared with


@dataclass(frozen=True)
class RowLives:
    """What the visits of each row say; every array is (rows,).

    `confidence` is the mean over visits of exp(-loss per token), the geometric mean of a token's probability, and
    `variability` its standard deviation, NaN for a single visit (arXiv 2009.10795). `log_probability` and its `spread`
    are the same of -loss per token. `first_learned` is the index of the first visit at which the row was learned, -1 if
    there is none; `forgotten` counts the visits at which it was learned while at the next it was not (arXiv
    1812.05159); `is_learned` says whether it was at its last visit.
    """

    visits: np.ndarray
    confidence: np.ndarray
    variability: np.ndarray
    log_probability: np.ndarray
    spread: np.ndarray
    first_loss: np.ndarray
    last_loss: np.ndarray
    first_learned: np.ndarray
    forgotten: np.ndarray
    is_learned: np.ndarray


def choose_threshold(last_losses: np.ndarray) -> float:
    """From which probability per token a row counts as learned: 0.5, or where few rows reach it, their median.

    A task of many right answers, such as free text, never gives a token half of the probability.
    """
    last = np.exp(-last_losses)
    return LEARNED if np.mean(last >= LEARNED) >= LEAST_LEARNED else float(np.median(last))


def describe_lives(losses: np.ndarray, threshold: float) -> RowLives:
    """The life of each row, from its losses per token in the order of its visits; NaN where it had no more visits.

    Every row has at least one visit. A constant series has variability 0.
    """
    seen = np.isfinite(losses)
    visits, last = seen.sum(1), seen.sum(1) - 1
    rows = np.arange(len(losses))
    is_learned = np.exp(-losses) >= threshold  # False where there was no visit
    lost = is_learned[:, :-1] & ~is_learned[:, 1:] & seen[:, 1:]
    return RowLives(
        visits,
        *_mean_and_deviation(np.exp(-losses)),
        *_mean_and_deviation(-losses),
        losses[:, 0],
        losses[rows, last],
        np.where(is_learned.any(1), is_learned.argmax(1), -1),
        lost.sum(1),
        is_learned[rows, last],
    )


def _mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over visits; the deviation is that of the population, NaN with a single visit."""
    means = np.nanmean(values, 1)
    deviations = np.sqrt(np.nanmean((values - means[:, None]) ** 2, 1))
    return means, np.where(np.isfinite(values).sum(1) > 1, deviations, np.nan)


def score_wrong_answers(losses: np.ndarray, steps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How much each row looks as if its answer belonged to another one, (rows,): higher is more.

    What a run learns of its task lowers the losses of rows that agree with the others; one that does not is learned
    last, by memorizing it. So the score is the mean over a row's visits of its loss per token above the usual one at
    that step, in robust standard deviations above rows of like length. The first of several visits is left out: it is
    near the base's. `losses` (rows, visits) is NaN where there was no visit, `steps` (rows, visits), `tokens` (rows,).
    benchmarks/explain/wrong_answers.py measures how well it finds them.
    """
    above = losses - usual_losses(losses, steps)
    later = above.copy()
    later[np.isfinite(losses).sum(1) > 1, 0] = np.nan
    return score_outliers(np.nanmean(later, 1), group_by_length(tokens, max(1, len(tokens) // LEAST_GROUP)))


def usual_losses(losses: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The median loss of the visits around each visit's step, (rows, visits): what a run had learned until then.

    A row that came early has a high loss for that reason alone. The steps around are as many before as after, and hold
    about 32 visits; fewer at both ends of the run, where the first and the last step stand alone.
    """
    seen = np.isfinite(losses)
    order = np.argsort(steps[seen], kind="stable")
    values = losses[seen][order]
    distinct, first = np.unique(steps[seen][order], return_index=True)
    ends = np.append(first, len(values))
    reach = max(1, round(TREND_VISITS * len(distinct) / max(1, len(values)) / 2))
    medians = np.zeros(len(distinct))
    for i in range(len(distinct)):
        k = min(reach, i, len(distinct) - 1 - i)
        medians[i] = np.median(values[ends[i - k] : ends[i + k + 1]])
    usual = np.full(losses.shape, np.nan)
    usual[seen] = medians[np.searchsorted(distinct, steps[seen])]
    return usual


def score_outliers(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How far each value (rows,) is above the median of its group, in robust standard deviations of the group.

    Formula: (x - median) / (1.4826 median |x - median|); 0 in a group whose values are all alike.
    """
    scores = np.zeros(len(values))
    for group in np.unique(groups):
        own = groups == group
        away = values[own] - np.median(values[own])
        scale = MAD_TO_DEVIATION * np.median(np.abs(away))
        scores[own] = away / scale if scale else 0.0
    return scores


def group_by_length(tokens: np.ndarray, most: int) -> np.ndarray:
    """A group for each row, of rows with about as many tokens: at most `most` of them, and no length in two."""
    edges = np.unique(np.quantile(tokens, np.linspace(0, 1, most + 1)[1:-1])) if most > 1 else np.zeros(0)
    groups: np.ndarray = np.searchsorted(edges, tokens, side="right")
    return groups


def find_components(size: int, pairs: np.ndarray) -> np.ndarray:
    """The connected component of each of `size` nodes, as the smallest node in it; `pairs` is (pairs, 2).

    Example:
        >>> find_components(5, np.array([[0, 3], [3, 4]])).tolist()
        [0, 1, 2, 0, 0]
    """
    parents = list(range(size))

    def find_root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for one, other in pairs.tolist():
        low, high = sorted((find_root(one), find_root(other)))
        parents[high] = low
    return np.array([find_root(node) for node in range(size)], dtype=np.int64)
