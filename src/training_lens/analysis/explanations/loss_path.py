"""The losses of an adapter with each module's update multiplied, and their gradients by the multipliers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training_lens.data.batching import collate, split_micro_batches
from training_lens.data.token_dataset import TokenDataset
from training_lens.display.progress import Progress
from training_lens.errors import EvaluationError
from training_lens.evaluation.evaluator import EvaluationOptions, token_sums
from training_lens.inference.session import Session
from training_lens.measures.integrated_gradients import (
    POINTS,
    TOLERANCE,
    completeness_residual,
    gauss_legendre,
    integrate_gradients,
)
from training_lens.models.model_classes import evaluation_mode
from training_lens.models.module_multipliers import MixedRowsError, ModuleMultipliers
from training_lens.utils.devices import autocast, free_memory
from training_lens.utils.logging import get_logger
from training_lens.utils.processes import Processes
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
CPU_TOKENS, GPU_TOKENS = 1024, 8192  # of a micro-batch with gradients, padding included; halved where memory runs out


@dataclass(frozen=True)
class PathShares:
    """Each row's change of its summed loss, shared out among the modules: `by_row` (rows, modules), nats.

    `residual` is the completeness residual at that many `points`.
    """

    by_row: np.ndarray
    points: int
    residual: float

    @property
    def is_complete(self) -> bool:
        """Whether the shares sum to the change of the loss, up to the tolerance."""
        return self.residual <= TOLERANCE


class LossPath:
    """One session's model on rows: its losses under multipliers of its modules, and their shares in the change."""

    def __init__(self, session: Session, dataset: TokenDataset, batch_tokens: int, progress: Progress) -> None:
        self.session, self.dataset, self._progress = session, dataset, progress
        self.multipliers = ModuleMultipliers(session.model)
        self._batch_tokens = batch_tokens
        self._gradient_tokens = CPU_TOKENS if session.device.type == "cpu" else GPU_TOKENS

    def measure_losses(self, values: Sequence[float], title: str) -> np.ndarray:
        """Each row's summed loss, (rows,) float64 nats, with module i's update times `values[i]`. Cost: one pass.

        Raises:
            EvaluationError: the model failed, or a loss is not finite.
        """
        with self._progress.task(title, len(self.dataset)) as advance, self.multipliers.apply_values(values):
            processes, precision = Processes(self.session.device), self.session.precision
            options = EvaluationOptions(processes, precision, self._batch_tokens, self.session.pad_id, advance)
            nll = token_sums(self.session.model, self.dataset, options).nll
        if not np.isfinite(nll).all():
            row = self.dataset.example_id(int(np.flatnonzero(~np.isfinite(nll))[0]))
            raise EvaluationError(
                f"{title}: the loss of the row {row} is not finite. The adapter's weights may be broken, or its "
                "precision too small: try training.precision=fp32 in a new run, or an earlier checkpoint."
            )
        return nll

    def share_change(self, change: np.ndarray, points: Sequence[int] = POINTS) -> PathShares:
        """Share the change of each row's loss out among the modules, see `measures.integrated_gradients`.

        Args:
            change: of each row's summed loss from base to adapter, (rows,).
            points: of the quadrature, tried in turn until the residual is within the tolerance.

        Cost: as many forward and backward passes as there are points, summed over those that are tried.
        """
        for count in points:
            nodes, weights = gauss_legendre(count)
            title = f"gradients at {count} points"
            with self._progress.task(title, count * len(self.dataset)) as advance, evaluation_mode(self.session.model):
                by_row = integrate_gradients((self._compute_gradients(alpha, advance) for alpha in nodes), weights)
            shares = PathShares(by_row, count, completeness_residual(by_row, float(change.sum())))
            if shares.is_complete:
                break
        return shares

    def _compute_gradients(self, alpha: float, advance: Callable[[float], None]) -> np.ndarray:
        """(rows, modules) at one point of the path; micro-batches are halved where memory runs out."""
        found = np.zeros((len(self.dataset), len(self.multipliers.names)))
        waiting = self._split_rows(np.arange(len(self.dataset)))
        while waiting:
            part, failed = waiting[0], None
            batch = collate([self.dataset[int(i)] for i in part], self.session.pad_id).move_to(self.session.device)
            try:
                with autocast(self.session.device, self.session.precision):
                    gradients, _ = self.multipliers.compute_gradients(
                        batch.input_ids, batch.loss_mask, batch.lengths, alpha
                    )
                found[part] = gradients.double().cpu().numpy()
            except MixedRowsError:
                failed = 1
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                failed = batch.input_ids.numel() // 2
            if failed is None:
                waiting.pop(0)
                advance(len(part))
                continue
            logger.info("gradients go on in micro-batches of %d tokens, or of one row", failed)
            self._gradient_tokens = failed
            waiting = self._split_rows(np.concatenate(waiting))
            del batch
            free_memory()
        return found

    def _split_rows(self, places: np.ndarray) -> list[np.ndarray]:
        return split_micro_batches(places, self.dataset.lengths, self._gradient_tokens)
