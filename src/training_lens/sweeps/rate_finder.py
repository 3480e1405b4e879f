"""The learning-rate finder: short exact runs on a grid of rates, all from one start, compared by held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_lens.config.schema import TrainingConfig
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError, TrainingError
from training_lens.evaluation.evaluator import EvaluationOptions, TokenSums, token_sums
from training_lens.models.adapters import base_only, trainable_parameters
from training_lens.models.fast.install import uninstall_kernels
from training_lens.sweeps.rate_advice import RateAdvice, RateLosses, advise_rate
from training_lens.training.adapted_base import build_trainer
from training_lens.training.loop.checkpoint_manager import CheckpointManager
from training_lens.training.loop.lr_schedule import default_lr
from training_lens.training.loop.trainer import Trainer
from training_lens.training.plan import RunPlan
from training_lens.training.run import TrainingWrapper
from training_lens.utils.devices import free_memory, keep_freed_memory, restore_rng_state, rng_state
from training_lens.utils.logging import quiet_screen

HELD_OUT = 0.1  # of the training rows, where the config has no validation rows
MOST_ROWS = 256  # held-out rows that each run is measured on
REPEATED = 2  # rates on each side of the best that run with the second seed, too
# A run is stopped as hopeless where its training loss is behind that of the best run at the same steps, on the same
# batches, by so many standard errors of the window's differences and by this share of what the best has gained.
BEHIND_ERRORS, BEHIND_SHARE = 4.0, 0.25
FIRST_CHECK = 1 / 3  # of the steps


@dataclass(frozen=True)
class RateOptions:
    """The grid: `points` rates, `factor` apart, around `training.lr` or the width's default; or `rates` themselves."""

    steps: int = 60
    points: int = 7
    factor: float = 2.0
    seeds: int = 2
    rates: Sequence[float] | None = None

    def list_rates(self, middle: float) -> list[float]:
        """Ascending, to two digits.

        Raises:
            ConfigurationError: fewer than three, or not positive numbers.
        """
        half = self.points // 2
        grid = self.rates or [middle * self.factor**i for i in range(-half, self.points - half)]
        found = sorted({float(f"{rate:.1e}") for rate in grid})
        if len(found) < 3 or not 0 < found[0] <= found[-1] < math.inf:
            raise ConfigurationError("--rates, --points: give at least three learning rates above 0.")
        return found


@dataclass(frozen=True)
class ShortRun:
    """One run: its training losses by step, and its held-out loss, None if it was stopped (`end` says why)."""

    rate: float
    seed: int
    losses: tuple[float, ...]
    held_out: float | None
    end: str
    seconds: float


@dataclass(frozen=True)
class RateSearch:
    """All runs, and the advice. `base_loss` is the base's on the same held-out rows; `default` is the grid's middle."""

    runs: tuple[ShortRun, ...]
    advice: RateAdvice
    default: float
    default_source: str
    steps: int
    full_steps: int
    scheduler: str
    held_out_rows: int
    base_loss: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class RateFinder:
    """Finds the learning rate of a config.

    Example:
        found = RateFinder(config, RateOptions()).search()
        print(found.advice)
    """

    def __init__(
        self,
        config: TrainingConfig,
        options: RateOptions,
        *,
        progress: Progress | None = None,
        announce: Callable[[str], None] = lambda _line: None,
    ) -> None:
        if config.data.validation is None and not config.data.val_ratio:
            config = config.replace_keys(data={"val_ratio": HELD_OUT})
            announce(f"no validation rows: {HELD_OUT:.0%} of the training rows are held out (data.val_ratio)")
        self._config, self._options = config, options
        self._progress, self._announce = progress or Progress(), announce

    def search(self) -> RateSearch:
        """Run the grid with one seed, then the rates around the best with the others.

        Cost: at most `steps` training steps for each rate, and for each other seed those of five rates. Nothing is
        written; the model is loaded once for each seed.

        Raises:
            TrainingLensError: what would stop `train`; TrainingError: every run diverged.
        """
        started = time.perf_counter()
        plan = TrainingWrapper(self._config).plan()
        default, source = self._find_default(plan)
        rates = self._options.list_rates(default)
        steps = min(self._options.steps, plan.schedule.total_steps)
        short = shorten_plan(plan, steps)
        self._announce_cost(short, rates, plan.schedule.total_steps)
        longest = len(rates) + (self._options.seeds - 1) * min(len(rates), 2 * REPEATED + 1)
        with self._progress.task("short runs", longest * steps, "steps") as advance, quiet_screen():
            runs, sums, base_loss = self._run_all(short, rates, default, advance)
        ended = [rate for rate in rates if (rate, 0) in sums]
        if not ended:
            raise TrainingError(f"every run diverged, down to a rate of {rates[0]:g}. Give lower --rates.")
        by_rate = tuple(tuple(s for (r, _), s in sums.items() if r == rate) for rate in ended)
        advice = advise_rate(RateLosses(tuple(ended), by_rate), default, rates, self._options.factor)
        assert short.validation is not None
        return RateSearch(
            runs=tuple(runs),
            advice=advice,
            default=default,
            default_source=source,
            steps=steps,
            full_steps=plan.schedule.total_steps,
            scheduler=plan.config.training.scheduler,
            held_out_rows=len(short.validation),
            base_loss=base_loss,
            seconds=round(time.perf_counter() - started, 1),
        )

    def _find_default(self, plan: RunPlan) -> tuple[float, str]:
        given = self._config.training.lr
        return (given, "training.lr") if given else (default_lr(plan.facts.width), "the model's width")

    def _announce_cost(self, plan: RunPlan, rates: Sequence[float], full: int) -> None:
        steps, training = plan.schedule.total_steps, plan.config.training
        again = (self._options.seeds - 1) * min(len(rates), 2 * REPEATED + 1)
        tokens = int(plan.train.lengths.mean() * plan.schedule.global_batch)
        self._announce(
            f"{len(rates)} rates from {rates[0]:g} to {rates[-1]:g}, {steps} steps each (the run has {full})"
            + (f", then {again} runs with other seeds" if again else "")
            + f": at most {(len(rates) + again) * steps:,} steps of about {tokens:,} tokens"
        )
        self._announce(
            f"schedule: the run's own ({training.scheduler}), shortened to {steps} steps: a rate that never falls ends "
            "in the noise of its last batches, which would favour rates that are too small"
        )

    def _run_all(
        self, plan: RunPlan, rates: Sequence[float], default: float, advance: Callable[[float], None]
    ) -> tuple[list[ShortRun], dict[tuple[float, int], TokenSums], float]:
        """The runs, the held-out sums of those that ended by (rate, number of the seed), and the base's loss."""
        runs: list[ShortRun] = []
        sums: dict[tuple[float, int], TokenSums] = {}
        base_loss = math.nan
        for number in range(self._options.seeds):
            chosen = _choose_repeated(rates, sums) if number else order_rates(rates, default)
            made, measured, loss = _run_seed(with_seed(plan, number), number, chosen, advance)
            free_memory()  # before the next seed loads the model again
            runs, base_loss = [*runs, *made], loss if number == 0 else base_loss
            sums |= {(rate, number): found for rate, found in measured.items()}
        return runs, sums, base_loss


def _run_seed(
    plan: RunPlan, number: int, rates: Sequence[float], advance: Callable[[float], None]
) -> tuple[list[ShortRun], dict[float, TokenSums], float]:
    """The runs of one seed, the held-out sums of those that ended, and the base's loss."""
    runner, runs, sums = _ShortRunner(plan, number, advance), list[ShortRun](), dict[float, TokenSums]()
    base_loss = runner.measure_base() if number == 0 else math.nan
    for rate in rates:
        run, found = runner.train(rate, [run for run in runs if run.held_out is not None])
        runs.append(run)
        sums |= {} if found is None else {rate: found}
        advance(plan.schedule.total_steps - len(run.losses))
    return runs, sums, base_loss


def shorten_plan(plan: RunPlan, steps: int) -> RunPlan:
    """The plan of a run of `steps` steps, its warm-up in proportion, measured on some of the held-out rows."""
    assert plan.validation is not None
    full, warmup = plan.schedule.total_steps, plan.config.training.warmup_steps
    shorter = {} if warmup is None else {"warmup_steps": round(warmup * steps / full)}
    rows = plan.validation.spread_positions(MOST_ROWS)
    config = plan.config.replace_keys(training={"max_steps": steps, **shorter})
    schedule = replace(plan.schedule, max_steps=steps)
    measured = replace(plan.rows, validation=plan.validation.select(rows))
    return replace(plan, config=config, schedule=schedule, rows=measured)


def with_seed(plan: RunPlan, number: int) -> RunPlan:
    """The plan with the seed's `number`th successor: another start of the adapter and other batches, the same rows."""
    seed = plan.config.training.seed + number
    return replace(
        plan,
        config=plan.config.replace_keys(training={"seed": seed}),
        schedule=replace(plan.schedule, seed=seed),
    )


def order_rates(rates: Sequence[float], middle: float) -> list[float]:
    """From the middle outwards: the first runs are likely the best, which the later ones are stopped against."""
    return sorted(rates, key=lambda rate: abs(math.log(rate / middle)))


def _choose_repeated(rates: Sequence[float], sums: dict[tuple[float, int], TokenSums]) -> list[float]:
    """The rates around the best of the first seed that ended, the best first."""
    losses = {rate: float(s.nll.sum() / s.tokens.sum()) for (rate, number), s in sums.items() if number == 0}
    if not losses:
        return []
    best = min(losses, key=losses.__getitem__)
    at = list(rates).index(best)
    near = [rate for rate in rates[max(0, at - REPEATED) : at + REPEATED + 1] if rate in losses]
    return order_rates(near, best)


def is_hopeless(losses: Sequence[float], best: Sequence[float], total: int) -> bool:
    """Whether a run is far behind the best one at the same steps; both are training losses on the same batches."""
    done, window = len(losses), max(5, total // 6)
    if done < max(window, FIRST_CHECK * total) or done == total:
        return False
    behind = np.array(losses[-window:]) - np.array(best[done - window : done])
    gained = best[0] - float(np.mean(best[done - window : done]))
    error = float(behind.std(ddof=1)) / math.sqrt(window)
    return float(behind.mean()) > max(BEHIND_ERRORS * error, BEHIND_SHARE * gained)


class _ShortRunner:
    """Runs of one seed: the base and the fresh adapter are made once, and put back before each run."""

    def __init__(self, plan: RunPlan, number: int, advance: Callable[[float], None]) -> None:
        self._plan, self._number, self._advance = plan, number, advance
        self._checkpoints = CheckpointManager(Path("unused"), "")
        model = plan.load_base()
        trainer = build_trainer(plan, model, self._checkpoints)
        self._model, self._random = trainer.model, rng_state()
        self._start = [(p, p.detach().clone()) for _, p in trainable_parameters(self._model)]
        uninstall_kernels(self._model)

    def measure_base(self) -> float:
        """The base's loss on the held-out rows."""
        with base_only(self._model):
            sums = self._measure(self._plan.micro_batch_tokens)
        return float(sums.nll.sum() / sums.tokens.sum())

    @keep_freed_memory()
    def train(self, rate: float, ended: Sequence[ShortRun]) -> tuple[ShortRun, TokenSums | None]:
        """One run, exactly as `train` would run it; stopped where it is hopeless against the best that `ended`."""
        started, losses, end = time.perf_counter(), list[float](), "ended"
        total = self._plan.schedule.total_steps
        trainer = self._build_trainer(rate)
        try:
            for step in self._plan.schedule.iterate_steps():
                losses.append(trainer.train_step(step).loss)
                self._advance(1)
                best = min(ended, key=lambda run: run.held_out or math.inf, default=None)
                if best and is_hopeless(losses, best.losses, total):
                    end = f"stopped: far behind the rate {best.rate:g}"
                    break
        except TrainingError:
            end = "diverged: the loss or a gradient is not finite"
        finally:
            uninstall_kernels(self._model)
        sums = self._measure(trainer.micro_batch_tokens) if end == "ended" else None
        if sums is not None and not np.isfinite(sums.nll).all():
            sums, end = None, "diverged: the held-out loss is not finite"
        held_out = None if sums is None else float(sums.nll.sum() / sums.tokens.sum())
        return ShortRun(rate, self._number, tuple(losses), held_out, end, time.perf_counter() - started), sums

    def _build_trainer(self, rate: float) -> Trainer:
        """A fresh trainer around the adapter as it started, with torch's random state of then."""
        with torch.no_grad():
            for parameter, value in self._start:
                parameter.grad = None
                parameter.copy_(value)
        settings = self._plan.config.replace_keys(training={"lr": rate}).training
        trainer = Trainer(self._model, replace(self._plan.loop_plan, settings=settings), self._checkpoints)
        trainer.set_token_budget()
        restore_rng_state(self._random)
        return trainer

    def _measure(self, tokens: int) -> TokenSums:
        plan = self._plan
        assert plan.validation is not None
        way = EvaluationOptions(plan.processes, plan.precision, tokens, plan.tokenizer.eos_token_id)
        return token_sums(self._model, plan.validation, way)
