"""Which training rows made an answer: a ranking, and what replays of the run without rows say of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training_lens.analysis.explanations.influence import Advance, PassOptions, score_by_gradients
from training_lens.analysis.explanations.row_evidence import (
    AnswerRows,
    DatamodelingScore,
    RankedRow,
    RowRanking,
    RowVerification,
)
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import CheckpointError, ConfigurationError
from training_lens.measures.row_influence import adam_direction, rank_correlation
from training_lens.runs.checkpoint_format import checkpoint_folder, verify_checkpoint
from training_lens.training.loop.checkpoint_manager import load_checkpoint
from training_lens.training.loop.trainer import Trainer
from training_lens.training.row_replay import RowReplay
from training_lens.utils.formatting import format_count, pluralize

CONTROLS = 3  # sets of random rows beside the top ones
LIKE_LENGTH = 20  # a control is drawn among so many rows of the nearest length
LEAST_SUBSETS = 16  # as few replays say nothing of a rank correlation
LEFT_OUT = 0.5  # of the rows, in each random subset of the linear datamodeling score


def describe_ranking_cost(replay: RowReplay) -> str:
    """What `rank_rows` computes, in one line."""
    rows, states = replay.training_rows, len(find_moments(replay))
    return (
        f"the gradient of each of {len(rows):,} rows at {pluralize(states, 'state')} of the run: forward and backward "
        f"passes over {format_count(states * int(rows.lengths.sum()))} tokens"
    )


def rank_rows(replay: RowReplay, queries: TokenDataset, progress: Progress | None = None) -> RowRanking:
    """The run's training rows ranked for each query, by gradients.

    Args:
        queries: texts whose supervised tokens are what the rows are ranked for, such as an answer.

    Cost: as `describe_ranking_cost` says.

    Raises:
        ConfigurationError: the run's optimizer kept no two moments for each number, as AdamW does.
        CheckpointError: the run has neither states nor an intact checkpoint.
    """
    states, progress = find_moments(replay), progress or Progress()
    texts = len(replay.training_rows) + len(queries)
    with replay.open_trainer() as trainer, progress.task("ranking rows", texts * len(states)) as advance:
        return _rank_by_gradients(replay, trainer, queries, states, advance)


def find_moments(replay: RowReplay) -> dict[int, Path]:
    """Where Adam's moments were kept, by step: the run's states, else the checkpoint of its adapter.

    Raises:
        CheckpointError: the run has neither.
    """
    if replay.states:
        return replay.states
    folder = checkpoint_folder(replay.run.checkpoints, replay.end)
    try:
        verify_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{replay.run.run_id} kept no states to rank rows at, and {error} Train it again with lens.keep_states=6."
        ) from error
    return {replay.end: folder}


def _rank_by_gradients(
    replay: RowReplay, trainer: Trainer, queries: TokenDataset, states: dict[int, Path], advance: Advance
) -> RowRanking:
    """Sum over states t of rate_t cos(g_t(query), Gamma_t(row)), arXiv 2402.04333."""
    rates, scores = replay.read_rates(), np.zeros((len(queries), len(replay.training_rows)))
    for step, folder in states.items():
        load_checkpoint(folder, trainer.model, trainer.optimizer, trainer.scaler)
        direction = read_adam_direction(trainer)
        rate = rates.get(step + 1, rates.get(step))
        if rate is None:
            raise CheckpointError(f"{replay.run.metrics_file} has lost the learning rate of step {step + 1}.")
        options = PassOptions(replay.plan.precision, trainer.micro_batch_tokens)
        found = score_by_gradients(trainer.engine, replay.training_rows, queries, options, direction, advance)
        scores += rate * found
    steps = ", ".join(map(str, states))
    numbers = sum(parameter.numel() for parameter in trainer.parameters)
    return RowRanking(
        scores,
        "learning rate times cosine of the query's gradient with the row's Adam update, summed over the states after "
        f"steps {steps}; {format_count(numbers)} numbers, unprojected",
    )


@dataclass(frozen=True)
class _ScaledDirection:
    """Adam's direction at a state, each number's times its group's `lr_factor`."""

    first: Tensor
    second: Tensor
    updates: int
    factors: Tensor

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.factors * adam_direction(gradient, self.first, self.second, self.updates)


def read_adam_direction(trainer: Trainer) -> _ScaledDirection:
    """The map from a gradient to Adam's next direction, with the moments that the trainer's optimizer has now.

    Raises:
        ConfigurationError: the optimizer is not AdamW.
    """
    optimizer, updates = trainer.optimizer, 0
    factor_of = {p: float(group["lr_factor"]) for group in optimizer.param_groups for p in group["params"]}
    parts: list[Tensor] = []
    for parameter in trainer.parameters:
        state = optimizer.state.get(parameter, {})
        if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
            raise ConfigurationError(
                f"rows are ranked by AdamW's moments, and this run trained with training.optimizer="
                f"{trainer.settings.optimizer}. Train it with training.optimizer=adamw."
            )
        first, second = (state[key].to(parameter.device).flatten() for key in ("exp_avg", "exp_avg_sq"))
        parts.append(torch.stack([first, second, torch.full_like(first, factor_of[parameter])]))
        updates = int(state["step"])
    first, second, factors = torch.cat(parts, 1)
    return _ScaledDirection(first, second, updates, factors)


def verify_rows(
    replay: RowReplay, ranking: RowRanking, query: TokenDataset, count: int, seed: int = 0
) -> RowVerification:
    """Replay the run without the `count` top rows for a query, and without as many random rows, `CONTROLS` times.

    The replays begin at the last state before the first use of the top rows; random rows are first used after it, too,
    where there are enough such rows, and have about the same length. Equal texts of top rows are no controls.

    Args:
        query: the one text that `ranking` is of.

    Cost: `CONTROLS` + 2 replays.

    Raises:
        ConfigurationError: there are not twice as many rows as `count`.
        TrainingError: the run does not repeat, see `RowReplay.measure`.
    """
    require_enough_rows(replay, count)
    rows = ranking.top_rows(count)
    start = replay.find_start(rows)
    generator = np.random.default_rng(seed)
    controls = [draw_controls(replay, rows, start, generator) for _ in range(CONTROLS)]
    replayed = replay.measure(query, [rows, *controls], start)
    sets = tuple(tuple(int(row) for row in control) for control in controls)
    return RowVerification(tuple(int(row) for row in rows), sets, replayed)


def require_enough_rows(replay: RowReplay, count: int) -> None:
    """Require twice as many rows as are left out.

    Raises:
        ConfigurationError: there are not.
    """
    if not 0 < 2 * count <= len(replay.training_rows):
        raise ConfigurationError(
            f"--verify {count}: the run has {len(replay.training_rows)} training rows. Give a number from 1 to half of "
            "them, so that as many random rows can be left out."
        )


def draw_controls(replay: RowReplay, rows: np.ndarray, start: int, generator: np.random.Generator) -> np.ndarray:
    """As many random rows, each of about the length of one of `rows`, and of other texts."""
    lengths, digests = replay.training_rows.lengths, replay.training_rows.digests
    is_free = ~np.isin(digests, digests[rows])
    is_later = is_free & (replay.first_uses() > start)
    if is_later.sum() >= len(rows):
        is_free = is_later
    drawn: list[int] = []
    for row in rows:
        free = np.flatnonzero(is_free)
        if not len(free):  # nearly all rows are copies of the top ones
            break
        nearest = free[np.argsort(np.abs(lengths[free] - lengths[row]), kind="stable")[:LIKE_LENGTH]]
        drawn.append(int(generator.choice(nearest)))
        is_free[drawn[-1]] = False
    return np.array(drawn, dtype=np.int64)


def require_enough_subsets(subsets: int) -> None:
    """Require as many random subsets as a rank correlation needs.

    Raises:
        ConfigurationError: fewer than 16.
    """
    if subsets < LEAST_SUBSETS:
        raise ConfigurationError(f"--lds {subsets}: give at least {LEAST_SUBSETS} random subsets; fewer say nothing.")


def measure_datamodeling(
    replay: RowReplay, queries: TokenDataset, ranking: RowRanking, subsets: int, seed: int = 0
) -> DatamodelingScore:
    """The linear datamodeling score of a ranking (arXiv 2303.14186): each subset is a random half of the rows.

    Predicted is minus the sum of the scores of the rows that are left out, measured the change of the query's
    log-probability after a replay of the whole run without them.

    Cost: `subsets` + 1 replays from the start.

    Raises:
        ConfigurationError: fewer than 16 subsets.
        TrainingError: the run does not repeat, see `RowReplay.measure`.
    """
    require_enough_subsets(subsets)
    generator, count = np.random.default_rng(seed), len(replay.training_rows)
    without = [generator.permutation(count)[: round(LEFT_OUT * count)] for _ in range(subsets)]
    changes = replay.measure(queries, without).changes
    pairs = zip(ranking.predict_changes(without).T, changes.T, strict=True)
    correlations = tuple(rank_correlation(predicted, measured) for predicted, measured in pairs)
    return DatamodelingScore(subsets, changes, correlations)


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
