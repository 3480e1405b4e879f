"""Which training rows made one answer of a run: a ranking, and on request replays that measure it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from training_lens.analysis.explanations.row_evidence import AnswerRows, RankedRow, RowRanking
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.training.row_ranking import (
    CONTROLS,
    describe_ranking_cost,
    find_moments,
    measure_datamodeling,
    rank_rows,
    require_enough_rows,
    require_enough_subsets,
    verify_rows,
)
from training_lens.training.row_replay import RowReplay


@dataclass(frozen=True)
class RowQuestions:
    """What to measure about the training rows behind an answer.

    `shown` rows of the ranking, the highest; `verify` top rows are left out of a replay, 0: none; `subsets` replays
    without a random half of the rows, at least 16, 0: none.
    """

    shown: int = 10
    verify: int = 0
    subsets: int = 0


def describe_row_costs(replay: RowReplay, questions: RowQuestions) -> Iterator[str]:
    """What `explain_answer_rows` computes, a line for each part.

    Raises:
        ConfigurationError: see `require_enough_rows` and `require_enough_subsets`.
        CheckpointError: see `find_moments`.
    """
    _check_questions(replay, questions)
    yield f"rows: {describe_ranking_cost(replay)}"
    if questions.verify or questions.subsets:
        replays = (CONTROLS + 2 if questions.verify else 0) + (questions.subsets + 1 if questions.subsets else 0)
        yield f"rows: at most {replay.describe_cost(replays)}"


def explain_answer_rows(
    replay: RowReplay,
    answer: TokenizedExample,
    questions: RowQuestions = RowQuestions(),
    progress: Progress | None = None,
) -> AnswerRows:
    """Which training rows made an answer.

    Args:
        answer: prompt and answer; its supervised tokens are what is explained.

    Cost: as `describe_row_costs` says.

    Raises:
        CheckpointError, ConfigurationError: see `rank_rows`, `verify_rows`, `measure_datamodeling`.
        TrainingError: the run does not repeat, see `RowReplay.measure`.
    """
    _check_questions(replay, questions)
    query = TokenDataset.from_examples([answer])
    ranking = rank_rows(replay, query, progress)
    check = verify_rows(replay, ranking, query, questions.verify) if questions.verify else None
    score = measure_datamodeling(replay, query, ranking, questions.subsets) if questions.subsets else None
    return AnswerRows(
        rows=len(replay.training_rows),
        steps=tuple(find_moments(replay)),
        log_probability=float(replay.measure_adapter(query)[0]),
        ranking=describe_top_rows(replay, ranking, ranking.top_rows(questions.shown)),
        detail=ranking.detail,
        verification=check,
        removed=describe_top_rows(replay, ranking, np.array(check.rows)) if check else (),
        datamodeling=score,
    )


def _check_questions(replay: RowReplay, questions: RowQuestions) -> None:
    if questions.verify:
        require_enough_rows(replay, questions.verify)
    if questions.subsets:
        require_enough_subsets(questions.subsets)


def describe_top_rows(replay: RowReplay, ranking: RowRanking, positions: np.ndarray) -> tuple[RankedRow, ...]:
    """These rows as they were trained on, with their scores for the ranking's first query."""
    first, decode = replay.first_uses(), partial(replay.plan.tokenizer.decode, skip_special_tokens=True)
    found = []
    for position in map(int, positions):
        row = replay.training_rows[position]
        prompt, answer = (str(decode(row.input_ids[mask].tolist())) for mask in (~row.loss_mask, row.loss_mask))
        score, tokens = float(ranking.scores[0, position]), int(replay.training_rows.supervised_counts[position])
        found.append(RankedRow(row.id, score, prompt, answer, tokens, int(first[position])))
    return tuple(found)
