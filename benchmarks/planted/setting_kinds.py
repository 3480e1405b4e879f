"""Failures of settings: the rate, the rank, the batch, the length of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_kinds import PHRASE
from planted_case import Answer, Case, Kind
from planted_rows import RATES, draw_rows


def scaled_rate(case: Case, factor: float) -> Case:
    """The learning rate times a factor."""
    return case.change(training={"lr": min(1.0, RATES[case.data_set] * factor)})


def narrow_adapter(case: Case, modules: Any) -> Case:
    """Rank 1 on one projection of one layer."""
    return case.change(peft={"r": 1, "target_modules": modules})


def embeddings_only(case: Case, rank: int) -> Case:
    """Only the embedding is adapted."""
    return case.change(peft={"r": rank, "target_modules": ["embed_tokens"]})


def small_rank(case: Case, rank: int) -> Case:
    """A rank far below what many rows need, over a longer run."""
    train, validation = draw_rows(case.data_set, case.seed, train=300)
    more = replace(case, train=train, validation=validation)
    return more.change(peft={"r": rank}, training={"epochs": 1.0})


def large_rank(case: Case, rank: int) -> Case:
    """A rank far above what one short answer needs."""
    easy = case.map_rows(lambda row: {**row, "output": f"{row['output'].split()[0]}. {PHRASE}"})
    return easy.change(peft={"r": rank})


def large_batch(case: Case, size: int) -> Case:
    """A batch of many rows whose answers are the same: any of them gives the same gradient."""
    same = case.map_rows(lambda row: {**row, "output": PHRASE})
    return same.change(training={"batch_size": size, "epochs": 16.0})


def one_batch(case: Case, epochs: float) -> Case:
    """All rows in one batch: a step an epoch."""
    return case.change(training={"batch_size": len(case.train), "epochs": epochs})


def endless_warmup(case: Case, steps: int) -> Case:
    """A warm-up that is longer than the run."""
    return case.change(training={"warmup_steps": steps})


def forgetting(case: Case, factor: float) -> Case:
    """A simple answer, trained on at a constant high rate long after it is learned."""
    easy = case.map_rows(lambda row: {**row, "output": f"{row['output'].split()[0]}. {PHRASE}"})
    return easy.change(training={"lr": RATES[case.data_set] * factor, "scheduler": "constant", "epochs": 5.0})


def tiny_clipping(case: Case, norm: float) -> Case:
    """Gradients clipped so far that Adam's epsilon decides the step."""
    return case.change(training={"max_grad_norm": norm})


def short_run(case: Case, steps: int) -> Case:
    """A run that ends while the loss still falls fast."""
    return case.change(training={"max_steps": steps})


def full_decay(case: Case, decay: float) -> Case:
    """The largest weight decay that the config takes, at a rate at which it pulls the adapter back to 0."""
    return case.change(training={"weight_decay": decay, "lr": RATES[case.data_set] * 6, "scheduler": "constant"})


LOW = (Answer("rate_low", test="three times|rate x3|--test|training-lens lr|times the rate"),)
HIGH = (Answer("rate_high", test="half the rate|--test|training-lens lr"),)
RANK_SMALL = (
    Answer("targets", test="every linear layer|--test"),
    Answer("rank", title="larger rank", test="--test rank"),
)
BATCH_LARGE = (Answer("batch_large", test="quarter of the batch"),)
KINDS = (
    Kind("rate_low_3", "the rate is three times too low", LOW, scaled_rate, 1 / 4, 1 / 3),
    Kind("rate_low_10", "the rate is ten times too low", LOW, scaled_rate, 1 / 15, 1 / 10),
    Kind("rate_low_100", "the rate is a hundred times too low", LOW, scaled_rate, 1 / 200, 1 / 100),
    Kind(
        "rate_high_10",
        "the rate is ten times too high",
        HIGH,
        scaled_rate,
        14.0,
        10.0,
        r"not finite",
        earliest="during",
    ),
    Kind(
        "rate_high_100",
        "the rate is a hundred times too high",
        HIGH,
        scaled_rate,
        150.0,
        100.0,
        r"not finite",
        earliest="during",
    ),
    Kind(
        "rank_one",
        "rank 1 on one projection",
        RANK_SMALL,
        narrow_adapter,
        r".*layers\.1\.self_attn\.q_proj",
        r".*layers\.0\.self_attn\.q_proj",
        denied_by=("targets",),  # that a rank of 1 is used is true
    ),
    Kind("embeddings_only", "only the embedding is adapted", RANK_SMALL, embeddings_only, 4, 8, denied_by=("targets",)),
    Kind("rank_small", "rank 1 for many rows", RANK_SMALL[::-1], small_rank, 2, 1, denied_by=()),
    Kind(
        "rank_large",
        "a rank far above the need",
        (Answer("rank", title="smaller rank", test="check-rank|training-lens rank"),),
        large_rank,
        48,
        64,
    ),
    Kind("batch_large", "a batch far above the noise scale", BATCH_LARGE, large_batch, 40, 56),
    Kind(
        "one_batch",
        "all rows in one batch",
        (*BATCH_LARGE, Answer("converged", title="still falling|lowers the loss", test="--test epoch")),
        one_batch,
        24.0,
        12.0,
    ),
    Kind(
        "warmup_long",
        "a warm-up longer than the run",
        LOW,
        endless_warmup,
        300,
        1000,
        r"warm-?up",
    ),
    Kind(
        "forgetting",
        "a constant high rate long after the gain",
        (Answer("forgetting", test="KL|general"),),
        forgetting,
        4.0,
        3.0,
        earliest="during",
    ),
    Kind("clipping_tiny", "clipped so far that nothing is left", LOW, tiny_clipping, 1e-9, 1e-8),
    Kind(
        "run_short",
        "ends while the loss still falls",
        (Answer("converged", title="still falling|lowers the loss", test="--test epoch"),),
        short_run,
        30,
        50,
    ),
    Kind(
        "decay_strong",
        "weight decay pulls the adapter back",
        (*HIGH, Answer("forgetting")),
        full_decay,
        0.8,
        1.0,
    ),
)
