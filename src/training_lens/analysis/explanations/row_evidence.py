"""Which training rows made an answer: their ranking, and what replays without rows measured, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from training_lens.measures.row_influence import RankCorrelation


@dataclass(frozen=True)
class RowRanking:
    """Training rows by what they did to queries: above 0 raised the query's log-probability, as gradients have it.

    `scores` is (queries, rows); `detail` says what they are.
    """

    scores: np.ndarray
    detail: str

    def top_rows(self, count: int, query: int = 0) -> np.ndarray:
        """The positions of the `count` rows of the highest score, the highest first; of equal ones the first."""
        return np.argsort(-self.scores[query], kind="stable")[:count]

    def predict_changes(self, without: Sequence[np.ndarray]) -> np.ndarray:
        """What leaving out each set of rows would do to each query, in the unit of the scores, (sets, queries)."""
        return np.stack([-self.scores[:, rows].sum(1) for rows in without])


@dataclass(frozen=True)
class ReplayedRows:
    """What replays measured: log-probabilities in nats, summed over each query's supervised tokens.

    `whole`, (queries,), is with every row, as the run's own adapter gives it; `without`, (sets, queries), is after the
    replay without each set of rows. `start` is the step after which the replays began, `end` their last.
    """

    start: int
    end: int
    whole: np.ndarray
    without: np.ndarray

    @property
    def changes(self) -> np.ndarray:
        """What leaving each set out did to each query's log-probability, (sets, queries): below 0 where it fell."""
        changes: np.ndarray = self.without - self.whole
        return changes


@dataclass(frozen=True)
class RowVerification:
    """The measured change of a query's log-probability without the top rows, and without random rows beside them.

    `controls` are sets of as many random rows of like length; `changes` (nats) begin with that of the top rows.
    """

    rows: tuple[int, ...]
    controls: tuple[tuple[int, ...], ...]
    replayed: ReplayedRows

    @property
    def change(self) -> float:
        """Without the top rows."""
        return float(self.replayed.changes[0, 0])

    @property
    def control_changes(self) -> tuple[float, ...]:
        """Without each set of random rows."""
        return tuple(float(change) for change in self.replayed.changes[1:, 0])

    @property
    def is_confirmed(self) -> bool:
        """Whether the answer lost more without the top rows than without each random set."""
        return self.change < min(0.0, *self.control_changes)


@dataclass(frozen=True)
class DatamodelingScore:
    """How well a ranking predicts what replays measure: Spearman's correlation over random subsets of rows, by query.

    `changes` (subsets, queries) is measured.
    """

    subsets: int
    changes: np.ndarray
    correlations: tuple[RankCorrelation, ...]


@dataclass(frozen=True)
class RankedRow:
    """A training row in a ranking: its score, texts, supervised tokens, and the first step that took it."""

    id: str
    score: float
    prompt: str
    answer: str
    supervised_tokens: int
    first_step: int


@dataclass(frozen=True)
class AnswerRows:
    """Which training rows made one answer.

    `log_probability` is the run's adapter's, of the answer's supervised tokens, in nats. `ranking` are the rows of
    the highest scores, of `rows` in all, and `detail` says what a score is. `steps` are those of the states.
    """

    rows: int
    steps: tuple[int, ...]
    log_probability: float
    ranking: tuple[RankedRow, ...]
    detail: str
    verification: RowVerification | None = None
    removed: tuple[RankedRow, ...] = ()
    datamodeling: DatamodelingScore | None = None

    def as_json(self) -> dict[str, Any]:
        """As in reports/explain-answer.json, under `rows`."""
        check, score = self.verification, self.datamodeling
        return {
            "rows": self.rows,
            "steps": list(self.steps),
            "log_probability": self.log_probability,
            "ranking": [asdict(row) for row in self.ranking],
            "detail": self.detail,
            "verification": check
            and {
                "rows": [row.id for row in self.removed],
                "start": check.replayed.start,
                "end": check.replayed.end,
                "change": check.change,
                "control_changes": list(check.control_changes),
                "confirmed": check.is_confirmed,
            },
            "datamodeling": score
            and {
                "subsets": score.subsets,
                **asdict(score.correlations[0]),
            },
        }
