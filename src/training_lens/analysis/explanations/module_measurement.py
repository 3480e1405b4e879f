"""Where an adapter's gain lives, measured on rows: shares of its modules, and losses without layers and modules.

Shares are integrated gradients on one multiplier per module (`measures.integrated_gradients`), with the residual that
shows whether they are complete. Beside them the measured counterfactuals: each layer off, and each layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training_lens.analysis.explanations.loss_path import LossPath, PathShares
from training_lens.analysis.explanations.module_gains import (
    DropTest,
    GroupShare,
    LayerTest,
    ModuleGains,
    ModuleShare,
    RowGroupShare,
    choose_drop,
)
from training_lens.analyzers.module_groups import OUTSIDE
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.core.modules import layer_and_kind
from training_lens.display.progress import Progress
from training_lens.evaluation.comparison import LengthBuckets
from training_lens.evaluation.evaluation_rows import EvaluationRows
from training_lens.evaluation.model_scores import Bootstrap
from training_lens.evaluation.verdict import Interval
from training_lens.inference.session import Session
from training_lens.measures.integrated_gradients import POINTS, TOLERANCE
from training_lens.models.adapter_scale import base_module
from training_lens.models.embedding_rows import has_token_rows

DROPPED = (0.1, 0.25, 0.5, 0.75, 0.9)  # shares of the modules whose drop is measured, those of the least gain first


def measure_modules(
    session: Session,
    rows: EvaluationRows,
    settings: EvaluationSection,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> ModuleGains:
    """Share the gain of a session's adapter out among its modules, on rows, and measure what each layer does.

    Args:
        settings: of the intervals, the buckets of length and the tokens of a forward pass.
        announce: called with the cost in passes and tokens, before they are made.

    Cost: 8 to 56 forward and backward passes over the rows, and 2 forward passes for each layer and 7 besides.

    Raises:
        AdapterError: the adapter has modules that cannot be multiplied.
        EvaluationError: the model failed on the rows.
    """
    path = LossPath(session, rows.dataset, settings.batch_tokens, progress or Progress())
    measurement = _ModuleMeasurement(path, settings)
    announce(measurement.describe_cost())
    return measurement.measure()


class _ModuleMeasurement:
    """The losses and shares of one adapter on the same rows, and their sums over groups."""

    def __init__(self, path: LossPath, settings: EvaluationSection) -> None:
        self._path, self._settings = path, settings
        self._names = path.multipliers.names
        self._places = [layer_and_kind(name) for name in self._names]
        self._tokens = path.dataset.supervised_counts
        self._bootstrap = Bootstrap(settings.resamples, settings.confidence, settings.seed)
        self._layers = self._group([OUTSIDE if layer is None else str(layer) for layer, _ in self._places])
        self._kinds = self._group([kind for _, kind in self._places])
        self._passes = 0

    @staticmethod
    def _group(names: Sequence[str]) -> dict[str, list[int]]:
        """The places of each name: layers by number, then the others in the modules' order."""
        ordered = sorted(
            dict.fromkeys(names), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
        )
        return {name: [i for i, other in enumerate(names) if other == name] for name in ordered}

    def describe_cost(self) -> str:
        tokens, points = int(self._path.dataset.lengths.sum()), " to ".join((str(POINTS[0]), str(sum(POINTS))))
        forward = 2 + 2 * len(self._layers) + len(self._drop_sizes())
        return f"{points} forward and backward passes and {forward} forward passes over {tokens:,} tokens"

    def measure(self) -> ModuleGains:
        every, none = [1.0] * len(self._names), [0.0] * len(self._names)
        base, whole = self._losses(none, "loss of the base"), self._losses(every, "loss of the adapter")
        shares = self._path.share_change(whole - base)
        layers = tuple(self._test_layers(base, whole, shares.by_row))
        modules = tuple(self._list_modules(shares.by_row, float((whole - base).sum())))
        drops = tuple(self._test_drops(modules, whole))
        offered, reason = choose_drop(drops, self._change(whole - base))
        tokens = self._tokens.sum()
        return ModuleGains(
            run=self._path.session.source,
            rows=len(self._tokens),
            supervised_tokens=int(tokens),
            confidence=self._settings.confidence,
            base_loss=float(base.sum() / tokens),
            loss=float(whole.sum() / tokens),
            change=float((whole - base).sum() / tokens),
            interval=self._change(whole - base)[1],
            points=shares.points,
            residual=shares.residual,
            tolerance=TOLERANCE,
            is_complete=shares.is_complete,
            modules=modules,
            by_layer=tuple(self._sum_groups(shares.by_row, self._layers)),
            by_kind=tuple(self._sum_groups(shares.by_row, self._kinds)),
            by_rows=tuple(self._split_rows(shares, whole - base)),
            layers=layers,
            drops=drops,
            offered=offered,
            reason=reason,
            notes=(),
            passes=self._passes,
            gradient_passes=sum(count for count in POINTS if count <= shares.points),
            tokens=int(self._path.dataset.lengths.sum()),
        )

    def _losses(self, values: Sequence[float], title: str) -> np.ndarray:
        self._passes += 1
        return self._path.measure_losses(values, title)

    def _change(self, sums: np.ndarray) -> tuple[float, Interval | None]:
        """Per token, with its interval; `sums` (rows,) are each row's."""
        draws = self._bootstrap.draw_ratios(sums[:, None], self._tokens)[:, 0]
        return float(sums.sum() / self._tokens.sum()), self._bootstrap.find_ends(draws)

    def _list_modules(self, by_row: np.ndarray, change: float) -> Iterator[ModuleShare]:
        draws = self._bootstrap.draw_ratios(by_row, self._tokens)
        layers = self._path.multipliers.layers
        for i, (name, (layer, kind)) in enumerate(zip(self._names, self._places, strict=True)):
            total = float(by_row[:, i].sum())
            yield ModuleShare(
                name,
                layer,
                kind,
                count_update_parameters(layers[i]),
                total / self._tokens.sum(),
                self._bootstrap.find_ends(draws[:, i]),
                total / change if change else None,
                has_token_rows(layers[i]),
            )

    def _sum_groups(self, by_row: np.ndarray, groups: Mapping[str, list[int]]) -> Iterator[GroupShare]:
        whole = by_row.sum()
        for name, places in groups.items():
            sums = by_row[:, places].sum(1)
            share, interval = self._change(sums)
            yield GroupShare(name, len(places), share, interval, float(sums.sum() / whole) if whole else None)

    def _split_rows(self, shares: PathShares, change: np.ndarray) -> Iterator[RowGroupShare]:
        """By domain, where there are several, and by length."""
        dataset, asked = self._path.dataset, self._settings.length_buckets
        buckets = (
            LengthBuckets.from_quantiles(dataset.lengths, asked)
            if isinstance(asked, int)
            else LengthBuckets.from_limits(asked)
        )
        domains = sorted({str(domain) for domain in dataset.domains if domain is not None})
        groups = [("domain", domain, dataset.domains == domain) for domain in domains if len(domains) > 1]
        assigned = buckets.assign(dataset.lengths)
        groups += [("length", label, assigned == i) for i, label in enumerate(buckets.labels)]
        for by, name, members in groups:
            if members.any():
                tokens = self._tokens[members]
                draws = self._bootstrap.draw_ratios(change[members, None], tokens)[:, 0]
                by_row = shares.by_row[members].sum(0) / tokens.sum()
                yield RowGroupShare(
                    by,
                    name,
                    int(members.sum()),
                    int(tokens.sum()),
                    float(change[members].sum() / tokens.sum()),
                    self._bootstrap.find_ends(draws),
                    {layer: float(by_row[places].sum()) for layer, places in self._layers.items()},
                    {kind: float(by_row[places].sum()) for kind, places in self._kinds.items()},
                )

    def _test_layers(self, base: np.ndarray, whole: np.ndarray, by_row: np.ndarray) -> Iterator[LayerTest]:
        for name, places in self._layers.items():
            members = np.isin(np.arange(len(self._names)), places)
            title = f"layer {name}" if name.isdigit() else name
            without = self._losses((~members).astype(float).tolist(), f"{title} off") - whole
            only = self._losses(members.astype(float).tolist(), f"{title} alone") - base
            (off, off_interval), (alone, alone_interval) = self._change(without), self._change(only)
            share = float(by_row[:, places].sum() / self._tokens.sum())
            yield LayerTest(name, len(places), share, off, off_interval, alone, alone_interval, off + alone)

    def _drop_sizes(self) -> list[int]:
        """How many modules are dropped; no drop takes all."""
        droppable = sum(not has_token_rows(layer) for layer in self._path.multipliers.layers)
        sizes = {round(share * droppable) for share in DROPPED}
        return sorted(size for size in sizes if 0 < size < droppable)

    def _test_drops(self, modules: Sequence[ModuleShare], whole: np.ndarray) -> Iterator[DropTest]:
        droppable = [i for i, module in enumerate(modules) if not module.has_new_rows]
        order = sorted(droppable, key=lambda i: -modules[i].share)
        for size in self._drop_sizes():
            dropped = order[:size]
            kept = [0.0 if i in dropped else 1.0 for i in range(len(modules))]
            nll = self._losses(kept, f"{size} of {len(modules)} modules off")
            cost, interval = self._change(nll - whole)
            yield DropTest(
                str(size),
                tuple(modules[i].name for i in sorted(dropped)),
                sum(m.parameters for i, m in enumerate(modules) if i not in dropped),
                float(nll.sum() / self._tokens.sum()),
                cost,
                interval,
            )


def count_update_parameters(layer: Any) -> int:
    """The parameters that an adapter holds for one of its modules; rows of new tokens that are tied, for the first."""
    if has_token_rows(layer) and layer.token_adapter.tied_adapter is not None:
        return 0
    own = {id(parameter) for parameter in base_module(layer).parameters()}
    return sum(parameter.numel() for parameter in layer.parameters() if id(parameter) not in own)
