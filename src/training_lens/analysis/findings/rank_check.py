"""Measures the loss of a trained adapter truncated to smaller ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from training_lens.analysis.findings.rank import ENERGY, RankCheck, RankLoss
from training_lens.analysis.run_rows import RowOptions, open_rows
from training_lens.core.modules import AdapterModule, adapter_modules
from training_lens.display.progress import Progress
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.evaluation.model_scores import Bootstrap, ModelScores
from training_lens.inference.session import Session
from training_lens.measures.curves import NORMAL_95
from training_lens.measures.singular_values import energy_rank, singular_values, truncate_rank
from training_lens.models.adapter_files import saved_shapes
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes

logger = get_logger(__name__)
BATCH_TOKENS = 4096
LARGER_SHARES = (0.95, 0.99)  # of |dW|^2, measured besides `ENERGY`


def measure_rank(
    run: RunFolder,
    max_examples: int | None = 200,
    data: Sequence[str] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    given: Mapping[str, Any] | None = None,
) -> RankCheck:
    """How truncating the run's adapter changes its validation loss; saved as `RUN/lens/rank_check.json`.

    Every dW is replaced by its best approximation (Eckart and Young 1936) of the rank that holds 90, 95 and 99 % of its
    squared norm, then of ranks 1, 2, 4, ... below its own. DoRA keeps its magnitudes, and modules trained whole stay
    whole. A rank that does not change the loss after training is no proof that training at that rank works as well; it
    is a reason to try.

    Args:
        max_examples: number of rows, the first ones that fit; None: all.
        data: sources to read instead of the run's validation rows.
        device: as `model.device`; None: the run's.
        given: see `open_run`.

    Cost: one forward pass over the rows per rank, two more for base and adapter, and a copy of the adapter.

    Raises:
        CheckpointError, AdapterError: the run is not finished, or cannot be loaded.
        ConfigurationError, DatasetError: there are no rows to measure on.
        EvaluationError: the model failed on them.

    Example:
        check = measure_rank(find_run("latest", "outputs", "default", finished=True))
        print(check.at_energy_ranks.delta, check.rank_pattern)
    """
    session, rows = open_rows(run, RowOptions(max_examples, data, device, given))
    modules = adapter_modules(session.model)
    shares = {share: _energy_ranks(modules, share) for share in (ENERGY, *LARGER_SHARES)}
    energy = shares[ENERGY]
    largest = max(m.record.rank for m in modules)
    fixed = [2**i for i in range((largest - 1).bit_length())]  # 1, 2, 4, ... below it
    passes = len(fixed) + len(shares) + 2
    tokens = int(rows.dataset.lengths.sum())
    logger.info("%d passes over %d rows of %d tokens in all", passes, len(rows.examples), tokens)
    with (progress or Progress()).task("losses by rank", passes * len(rows.examples)) as advance:
        measure = _TruncationLosses(session, rows, modules, advance)
        base, whole = measure.measure_loss(base_only(session.model)), measure.measure_loss(nullcontext())
        at_energy, *at_larger = (
            replace(measure.measure_truncated(None, ranks, whole), share=share) for share, ranks in shares.items()
        )
        at_fixed = tuple(measure.measure_truncated(rank, dict.fromkeys(energy, rank), whole) for rank in fixed)
    check = RankCheck(
        step=int(run.read_metadata("summary.json")["steps"]),
        rows=len(rows.examples),
        supervised_tokens=int(rows.dataset.supervised_counts.sum()),
        base_loss=base.measure_all()["loss"],
        loss=whole.measure_all()["loss"],
        loss_error=_standard_error(whole),
        ranks={m.name: m.record.rank for m in modules},
        energy_ranks=energy,
        at_energy_ranks=at_energy,
        at_fixed_ranks=at_fixed,
        rank_pattern=_build_rank_pattern(energy),
        at_larger_shares=tuple(at_larger),
        parameters=measure.count_parameters({}),
    )
    check.write(run.root / "lens")
    return check


def _energy_ranks(modules: Sequence[AdapterModule], share: float) -> dict[str, int]:
    """How many directions of each module's dW hold this share of its squared norm."""
    spectra = {m.name: singular_values(*m.trained_factors(), m.record.scaling) for m in modules}
    return {name: int(energy_rank(spectrum, share)) for name, spectrum in spectra.items()}


class _TruncationLosses:
    """Losses of one session's model on one set of rows."""

    def __init__(
        self, session: Session, rows: EvaluationRows, modules: Sequence[AdapterModule], advance: Callable[[float], None]
    ) -> None:
        self._session, self._rows, self._modules = session, rows, modules
        self._way = EvaluationOptions(
            Processes(session.device), session.precision, BATCH_TOKENS, session.pad_id, advance
        )

    def measure_loss(self, changed: AbstractContextManager[object]) -> ModelScores:
        """The losses of the model inside the `changed` context."""
        with changed:
            sums = token_sums(self._session.model, self._rows.dataset, self._way)
        return ModelScores(sums, self._rows.text_bytes, self._rows.tokens_id)

    def measure_truncated(self, rank: int | None, ranks: Mapping[str, int], whole: ModelScores) -> RankLoss:
        """The loss with each module truncated to its rank in `ranks`."""
        scored = self.measure_loss(truncate_modules(self._modules, ranks))
        change, intervals = Bootstrap().measure_change(scored, whole)
        low, high = intervals.get("loss", (None, None))
        size = self.count_parameters(ranks)
        return RankLoss(rank, scored.measure_all()["loss"], change["loss"], low, high, parameters=size)

    def count_parameters(self, ranks: Mapping[str, int]) -> int:
        """The numbers in the adapter's file with each module cut to its rank in `ranks`, of 1 at least."""
        assert self._session.adapter is not None
        whole = sum(map(math.prod, saved_shapes(self._session.adapter).values()))
        records = [m.record for m in self._modules]
        cut = (
            (r.rank - max(1, min(r.rank, ranks.get(r.name, r.rank)))) * (r.in_features + r.out_features)
            for r in records
        )
        return whole - sum(cut)


@contextmanager
def truncate_modules(modules: Sequence[AdapterModule], ranks: Mapping[str, int]) -> Iterator[None]:
    """Inside the context, each module's dW is its best approximation of the rank in `ranks`."""
    own = [(m, *m.trained_factors()) for m in modules]
    before = [(m, a.clone(), b.clone()) for m, a, b in own]
    try:
        for module, a, b in before:
            _set_factors(module, *truncate_rank(a, b, module.record.scaling, ranks[module.name]))
        yield
    finally:
        for module, a, b in before:
            _set_factors(module, a, b)


def _set_factors(module: AdapterModule, a: torch.Tensor, b: torch.Tensor) -> None:
    for own, given in zip(module.trained_factors(), (a, b), strict=True):
        own.copy_(given)


def _build_rank_pattern(energy: Mapping[str, int]) -> dict[str, int]:
    """The largest rank over layers and experts by the last part of the module name (of experts: two), at least 1."""
    pattern: dict[str, int] = {}
    for name, rank in energy.items():
        path, bracket, _ = name.partition("#")[0].partition("[")
        last = ".".join(path.split(".")[-2 if bracket else -1 :])
        pattern[last] = max(1, rank, pattern.get(last, 1))
    return pattern


def _standard_error(scored: ModelScores) -> float | None:
    interval = Bootstrap().measure_intervals(scored).get("loss")
    return (interval[1] - interval[0]) / (2 * NORMAL_95) if interval else None
