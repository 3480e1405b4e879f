"""What an adapter remembers of its rows: the exposure of canaries and chosen rows, and exact greedy continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from training_lens.analysis.explanations.training_rows import TrainingRows, open_rows_of, shorten_text
from training_lens.data.canaries import Canary, draw_candidates
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import tokenize
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.evaluation.evaluator import EvaluationOptions, find_greedy_matches, token_sums
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import Session, open_run
from training_lens.measures.exposure import (
    count_leading,
    expected_exposure,
    exposure_deviation,
    find_longest_run,
    measure_exposure,
)
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.formatting import format_count, pluralize
from training_lens.utils.processes import Processes

CANDIDATES, SAMPLES = 1024, 64
FEWEST_CANDIDATES, MOST_CANDIDATES = 16, 1_000_000
EVALUATED_TOKENS = 4096  # at most in one forward pass
TRAINED, UNSEEN, CHOSEN = "training rows", "unseen rows", "chosen rows"


@dataclass(frozen=True)
class MemoryOptions:
    """What is measured: `candidates` is |R|, `samples` the most rows of either kind that are continued, `rows` the ids
    of chosen training rows. `device` and `given` are those of `open_run`."""

    candidates: int = CANDIDATES
    samples: int = SAMPLES
    rows: tuple[str, ...] = ()
    device: str | None = None
    given: Any = None

    def check_values(self) -> None:
        """Raise ConfigurationError where a number is out of its range."""
        if not FEWEST_CANDIDATES <= self.candidates <= MOST_CANDIDATES:
            raise ConfigurationError(
                f"--candidates {self.candidates}: give {FEWEST_CANDIDATES} to {MOST_CANDIDATES:,}."
            )
        if self.samples < 0:
            raise ConfigurationError(f"--samples {self.samples}: give 0 or more.")


@dataclass(frozen=True)
class RowExposure:
    """The exposure in bits of one row among its candidates; `repeats` is None for a row that is no canary, whose
    `base_exposure` is that by the base."""

    id: str
    repeats: int | None
    exposure: float
    base_exposure: float | None
    prompt: str
    answer: str


@dataclass(frozen=True)
class Continuation:
    """How far greedy decoding repeats one row: `leading` tokens from the beginning of its answer, and the `longest`
    run from any prefix of the row, of `tokens`; `base` is the longest of the base."""

    id: str
    group: str
    tokens: int
    leading: int
    longest: int
    base: int
    prefix: str
    text: str

    @property
    def share(self) -> float:
        """The longest run as a part of the row's tokens."""
        return self.longest / self.tokens


@dataclass(frozen=True)
class MemoryExplanation:
    """What was measured. `chance` is the mean exposure of a canary that was never seen, `chance_deviation` the standard
    deviation of a single one; `notes` say what could not be measured."""

    run: str
    candidates: int
    chance: float
    chance_deviation: float
    exposures: tuple[RowExposure, ...]
    continuations: tuple[Continuation, ...]
    notes: tuple[str, ...]

    def find_group(self, name: str) -> list[Continuation]:
        return [row for row in self.continuations if row.group == name]

    def list_repeats(self) -> dict[int, list[float]]:
        """The exposures of canaries by how often an epoch visited them; 0 are those that were never planted."""
        found: dict[int, list[float]] = {}
        for row in self.exposures:
            if row.repeats is not None:
                found.setdefault(row.repeats, []).append(row.exposure)
        return dict(sorted(found.items()))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def explain_memory(
    run: RunFolder,
    options: MemoryOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> MemoryExplanation:
    """Measure what a finished adapter remembers. Nothing is generated: a pass of the true text says what greedy
    decoding would repeat.

    Args:
        announce: called with the cost before anything is measured.

    Cost: a forward pass of each candidate, and two of each row that is continued.

    Raises:
        CheckpointError, AdapterError: the run is not finished, its rows changed, or it cannot be loaded.
        ConfigurationError: options out of range, or no such row.
    """
    options, progress = options or MemoryOptions(), progress or Progress()
    options.check_values()
    rows = open_rows_of(run, progress, options.given)
    chosen = [rows.require_place(row_id) for row_id in options.rows]
    session = open_run(run, options.device, given=options.given, adapter=run.adapter)
    continued, notes = _collect_continued(run, session, rows, chosen, options.samples)
    sets = [_CanarySet.build(row, rows, options) for row in (rows.canaries.rows if rows.canaries else ())]
    sets += [found for place in chosen if (found := _CanarySet.build_from_row(rows, place, options)) is not None]
    if not rows.canaries:
        notes.append(
            "This run planted no canaries; data.canaries=4 plants some, whose exposure has a known chance level."
        )
    tokens = sum(int(each.dataset.lengths.sum()) * (1 if each.repeats is not None else 2) for each in sets)
    tokens += sum(2 * int(dataset.lengths.sum()) for _, dataset in continued)
    continuing = sum(len(dataset) for _, dataset in continued)
    announce(
        f"forward passes over {format_count(tokens)} tokens: {pluralize(len(sets), 'row')} among "
        f"{options.candidates:,} candidates each, {pluralize(continuing, 'row')} continued"
    )
    measured = _MemoryMeasurement(session, progress)
    return MemoryExplanation(
        str(run.root),
        options.candidates,
        expected_exposure(options.candidates),
        exposure_deviation(options.candidates),
        tuple(measured.measure_exposures(sets)),
        tuple(measured.measure_continuations(continued, rows.tokenizer)),
        tuple(notes),
    )


def _collect_continued(
    run: RunFolder, session: Session, rows: TrainingRows, chosen: Sequence[int], samples: int
) -> tuple[list[tuple[str, TokenDataset]], list[str]]:
    """The rows that are continued, by group, and what there is to note."""
    places = rows.dataset.spread_positions(samples)
    found, notes = [(TRAINED, rows.dataset.select(places))] if samples else [], list[str]()
    if samples:
        try:
            unseen = EvaluationRows.from_examples(validation_examples(run, session, samples), session).dataset
            found.append((UNSEEN, unseen))
        except ConfigurationError:
            notes.append("The run had no validation rows, so its training rows are compared with no unseen ones.")
    if chosen:
        found.append((CHOSEN, rows.dataset.select(np.array(chosen, dtype=np.int64))))
    return found, notes


@dataclass(frozen=True)
class _CanarySet:
    """A row with its other candidates behind it, and what the result says of it."""

    id: str
    repeats: int | None
    prompt: str
    answer: str
    dataset: TokenDataset

    @classmethod
    def build(cls, canary: Canary, rows: TrainingRows, options: MemoryOptions) -> _CanarySet:
        assert rows.canaries is not None
        others = draw_candidates(canary, options.candidates, rows.canaries.seed)
        examples = [canary.as_example(), *map(canary.as_example, others)]
        tokens = [example for example in tokenize(examples, rows.preparation) if example is not None]
        return cls(canary.id, canary.repeats, canary.question, canary.answer, TokenDataset.from_examples(tokens))

    @classmethod
    def build_from_row(cls, rows: TrainingRows, place: int, options: MemoryOptions) -> _CanarySet | None:
        """A training row whose other candidates are the answers of rows of like length; None if it has no one answer.

        The longer an answer the higher its loss, so of more rows than candidates those of the nearest length are taken.
        """
        own, dataset = rows.dataset[place], rows.dataset
        if (cut := _find_answer(own)) is None:
            return None
        count = int(dataset.supervised_counts[place])
        nearest = np.argsort(np.abs(dataset.supervised_counts - count), kind="stable")
        found = {own.input_ids[cut:].tobytes(): own}
        for other in nearest.tolist():
            if len(found) == options.candidates:
                break
            example = dataset[other]
            if (start := _find_answer(example)) is not None:
                answer = example.input_ids[start:]
                ids = np.concatenate([own.input_ids[:cut], answer])
                mask = np.arange(len(ids)) >= cut
                found.setdefault(answer.tobytes(), replace(own, input_ids=ids, loss_mask=mask))
        prompt, answer_text = rows.read_text(dataset.example_id(place))
        return cls(
            dataset.example_id(place), None, prompt, answer_text, TokenDataset.from_examples(list(found.values()))
        )


def _find_answer(example: TokenizedExample) -> int | None:
    """Where the one answer of a row begins; None if it has several, or no prompt."""
    start = int(example.loss_mask.argmax())
    return start if start and example.loss_mask[start:].all() else None


class _MemoryMeasurement:
    """The passes of one session."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self._session, self._progress = session, progress

    def measure_exposures(self, sets: Sequence[_CanarySet]) -> list[RowExposure]:
        found = []
        with self._progress.task("ranking candidates", sum(len(each.dataset) for each in sets), "rows") as advance:
            for each in sets:
                exposure, base = self._rank(each, advance), None
                if each.repeats is None:
                    with base_only(self._session.model):
                        base = self._rank(each, lambda _: None)
                found.append(RowExposure(each.id, each.repeats, exposure, base, each.prompt, each.answer))
        return found

    def _rank(self, each: _CanarySet, advance: Callable[[float], None]) -> float:
        sums = token_sums(self._session.model, each.dataset, self._options(advance))
        losses = sums.nll if each.repeats is not None else sums.nll / sums.tokens
        return measure_exposure(float(losses[0]), losses[1:])

    def measure_continuations(self, groups: Sequence[tuple[str, TokenDataset]], tokenizer: Any) -> list[Continuation]:
        found = []
        with self._progress.task("continuing rows", 2 * sum(len(d) for _, d in groups), "rows") as advance:
            for name, dataset in groups:
                matches = find_greedy_matches(self._session.model, dataset, self._options(advance))
                with base_only(self._session.model):
                    of_base = find_greedy_matches(self._session.model, dataset, self._options(advance))
                for place, (own, base) in enumerate(zip(matches, of_base, strict=True)):
                    found.append(_describe_continuation(name, dataset[place], own, base, tokenizer))
        return found

    def _options(self, advance: Callable[[float], None]) -> EvaluationOptions:
        session = self._session
        return EvaluationOptions(
            Processes(session.device), session.precision, EVALUATED_TOKENS, session.pad_id, advance
        )


def _describe_continuation(
    group: str, example: TokenizedExample, own: np.ndarray, base: np.ndarray, tokenizer: Any
) -> Continuation:
    length, start = find_longest_run(own)
    targets = np.flatnonzero(example.loss_mask[1:]) + 1  # positions of the tokens that are predicted
    begin = int(targets[start]) if length else 0
    prefix, text = (
        shorten_text(str(tokenizer.decode(part.tolist(), skip_special_tokens=True)))
        for part in (example.input_ids[:begin], example.input_ids[targets[start : start + length]])
    )
    return Continuation(
        example.id, group, len(own), count_leading(own), length, find_longest_run(base)[0], prefix, text
    )
