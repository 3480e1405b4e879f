"""Checks on the training rows together: duplicates, and the same prompt with different answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training_lens.analysis.findings.finding import Finding, Rule
from training_lens.data.batching import Schedule
from training_lens.data.token_dataset import TokenDataset
from training_lens.training.preflight.row_scan import RowScan

REPEATED = 0.05  # share of the rows
VISITS = 4.0  # epochs of repeated data that are about as good as new data
DISAGREEING = 0.05
LEAST_LOSS = 0.005  # nats per token: of long answers, the choice among them is a small part
_MIX = np.uint64(0x9E3779B97F4A7C15)

DUPLICATES = Rule(
    code="duplicates",
    signature="training rows that repeat another one (case, punctuation and white space apart), by themselves or by "
    "data.weights",
    threshold=f"{REPEATED:.0%} of the rows, or a run that shows its distinct rows more than {VISITS:g} times each, and "
    "more often than its epochs say",
    source="exact counts; up to about four epochs, repeated data are nearly as good as new (arXiv 2305.16264)",
    action="training-lens prepare leaves duplicates out; or lower training.epochs by the same factor",
)
DISAGREEMENT = Rule(
    code="label_disagreement",
    signature="rows with the same prompt (case, punctuation and white space apart) and different answers",
    threshold=f"{DISAGREEING:.0%} of the rows, and a least loss of {LEAST_LOSS:g} nats per token",
    source="exact counts; the entropy of the answers to a prompt is the least loss that the prompt alone allows",
    action="keep one answer a prompt, or put into the prompt what decides between them",
)


def count_visits(schedule: Schedule) -> np.ndarray:
    """How often the run shows each training example, on average over random draws; (examples,) float64."""
    mix = schedule.mix
    weights = np.ones(schedule.examples) if mix is None else np.asarray(mix.weights, dtype=np.float64)[mix.entries]
    visits: np.ndarray = weights * schedule.total_steps / schedule.steps_per_epoch
    return visits


def check_duplicates(scan: RowScan, schedule: Schedule) -> Finding:
    """The share of rows that repeat another, and the epochs that they and the weights amount to."""
    visits = count_visits(schedule)
    group = _group_rows(_hash_prompts(scan.dataset), scan.dataset.identities[:, 0])
    rows, distinct = len(group), int(group.max()) + 1
    by_row = np.bincount(group, weights=visits)
    mean, most = float(visits.sum() / distinct), float(by_row.max())
    epochs = schedule.total_steps / schedule.steps_per_epoch
    share = 1 - distinct / rows
    measured = (
        f"{rows:,} rows are {distinct:,} different ones ({share:.1%} repeat another); {epochs:.3g} epochs show each "
        f"{mean:.3g} times on average, the most frequent {most:.3g} times"
    )
    evidence = {"share": share, "distinct": distinct, "epochs": epochs, "visits": mean, "most_visits": most}
    is_often = mean > VISITS and mean > 1.25 * epochs
    if distinct == rows and not is_often:
        return DUPLICATES.report_fine("No row is repeated", measured, evidence=evidence)
    first = np.unique(group, return_index=True)[1]
    repeats = np.setdiff1d(np.arange(rows), first)[:3]
    shown = [scan.show_row(int(i)) | {"repeats": scan.dataset.example_id(int(first[group[i]]))} for i in repeats]
    named = "; ".join(f"{row['row']} repeats {row['repeats']}" for row in shown)
    return DUPLICATES.report_symptom(
        "warning" if is_often or share >= REPEATED else "note",
        "Training rows are repeated",
        f"{measured}: {named}" if named else f"{measured}, by data.weights",
        confidence="sure",
        evidence={**evidence, "rows": shown},
    )


@dataclass(frozen=True)
class _Answers:
    """Of each row: how many rows have its prompt, and how many of these also its answer."""

    asked: np.ndarray
    alike: np.ndarray

    @classmethod
    def from_dataset(cls, dataset: TokenDataset) -> _Answers:
        prompts = _hash_prompts(dataset)
        questions, answers = _group_rows(prompts), _group_rows(prompts, dataset.identities[:, 0])
        return cls(np.bincount(questions)[questions], np.bincount(answers)[answers])


def check_disagreement(scan: RowScan) -> Finding:
    """The share of rows whose prompt has another answer elsewhere, and the loss that this costs at least."""
    answers = _Answers.from_dataset(scan.dataset)
    contested = scan.is_asked & (answers.alike < answers.asked)
    share = float(contested.mean())
    if not contested.any():
        return DISAGREEMENT.report_fine("No prompt has two answers", f"{int(scan.is_asked.sum()):,} prompts")
    nats = float(np.log(answers.asked / answers.alike)[contested].sum() / scan.dataset.supervised_counts.sum())
    prompts = _hash_prompts(scan.dataset)
    position = int(np.flatnonzero(contested)[0])
    alike = np.flatnonzero(prompts == prompts[position])[:3]
    shown = [scan.show_row(int(i)) for i in alike]
    named = "; ".join(f"{row['row']} -> {row['learned']!r}" for row in shown)
    return DISAGREEMENT.report_symptom(
        "warning" if share >= DISAGREEING and nats >= LEAST_LOSS else "note",
        "The same prompt has different answers",
        f"{int(contested.sum()):,} rows ({share:.1%}); by the prompt alone the loss cannot fall below {nats:.3g} nats "
        f"per token. Such as {named}",
        confidence="sure",
        evidence={"share": share, "least_loss": nats, "rows": shown},
    )


def _hash_prompts(dataset: TokenDataset) -> np.ndarray:
    """A hash of each row's question and domain, which is part of the prompt; (rows,) uint64."""
    domains: dict[str | None, int] = {}
    codes = np.array([domains.setdefault(name, len(domains)) for name in dataset.domains.tolist()], dtype=np.uint64)
    mixed: np.ndarray = dataset.identities[:, 1] ^ (codes * _MIX)
    return mixed


def _group_rows(*hashes: np.ndarray) -> np.ndarray:
    """The number of each row's group, from 0: rows of a group are equal in all hashes."""
    mixed = hashes[0]
    for other in hashes[1:]:
        mixed = mixed * _MIX ^ other
    group: np.ndarray = np.unique(mixed, return_inverse=True)[1]
    return group
