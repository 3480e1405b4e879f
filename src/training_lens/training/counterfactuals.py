"""Test runs: short exact runs with one setting changed, which answer what a run's own curves cannot.

A test run is the run itself at another length: the same rows in the same order, the same start for the same seed, and
the learning rate's schedule over its own steps. Only the answers are written, `RUN/lens/interventions.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from training_lens.analysis.findings.interventions import (
    Intervention,
    Question,
    measure_changes,
    write_interventions,
)
from training_lens.config.run_config import Settings
from training_lens.config.schema import PeftSection, TrainingConfig
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, CheckpointError, ConfigurationError, TrainingError
from training_lens.models.adapter_files import adopt_saved_settings
from training_lens.models.adapters import Adaptation, check_adapter
from training_lens.models.factory import build_skeleton
from training_lens.runs.metrics_log import read_metrics
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.lr_schedule import count_warmup_steps
from training_lens.training.loop.memory_budget import explain_out_of_memory
from training_lens.training.plan import RunPlan
from training_lens.training.plan_runner import PlanRunner, plan_recorded_run
from training_lens.utils.formatting import format_count, format_seconds
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
REPLAYED_STEPS = 10
LEAST_STEPS = 50
BUDGET_SECONDS = 300.0  # for all runs of one question, unless the number of steps is given
ROWS = 256  # validation rows, spread evenly
FACTOR = 3.0  # between two learning rates
FORWARD = 1 / 3  # of a training step's time
SAME_LOSS = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # relative; rounding differs between machines
Changes = dict[str, tuple[str, TrainingConfig]]  # name -> the setting as it is typed, and the config with it


@dataclass(frozen=True)
class PlannedTest:
    """The runs that answer a question: by the name of a change its setting, as typed, and its config.

    `tokens` is what all runs train on, `seconds` how long they take at the run's own recorded speed; both about.
    """

    question: Question
    changes: Changes
    steps: int
    total_steps: int
    seeds: tuple[int, ...]
    tokens: int = 0
    seconds: float = 0.0

    @property
    def runs(self) -> int:
        """How many runs are trained. An added epoch is compared with the run's own adapter, which is there."""
        return len(self.seeds) * (len(self.changes) + (self.question != "epoch"))

    def describe_cost(self) -> str:
        """What will be trained and how long that takes, in one line."""
        if not self.changes:
            return f"{self.question}: this run has nothing to change"
        settings = ", ".join(setting for setting, _ in self.changes.values())
        return (
            f"{self.question}: {self.runs} runs of {self.steps} of {self.total_steps} steps ({settings}), "
            f"{format_count(self.tokens)} tokens, about {format_seconds(self.seconds)}"
        )


class RunTests:
    """The tests of one run: what each costs, and what it measures.

    Args:
        run: of `training-lens train`, with validation rows.
        given: the user's consent to code of the run's model, see `open_run_config`.

    Raises:
        CheckpointError, ConfigurationError, AdapterError: the run cannot be repeated: its rows or its base changed, it
            recorded no losses, or it has no validation rows.

    Example:
        tests = RunTests(find_run("latest", "outputs", "default"))
        planned = tests.plan("rate")
        print(planned.runs, planned.steps, planned.seconds)
        tests.measure([planned])[0].describe("higher", "lower")
    """

    def __init__(self, run: RunFolder, progress: Progress | None = None, given: Settings | None = None) -> None:
        self._run, self._progress = run, progress or Progress()
        self._log = [line for line in read_metrics(run.metrics_file) if line.get("kind") == "step"]
        if not self._log:
            raise CheckpointError(f"{run.root} has recorded no step yet, with which a test could be compared.")
        self._summary = run.read_metadata("summary.json")
        self._plan = plan_recorded_run(run, self._progress, given)
        if self._plan.validation is None:
            raise ConfigurationError(
                "--test compares losses on validation rows, and this run has none. Train with data.validation=FILE or "
                "data.val_ratio=0.1."
            )
        self._validation = self._plan.validation
        self._positions = self._validation.spread_positions(ROWS)
        self._rows = self._validation.select(self._positions)

    def plan(self, question: Question, steps: int | None = None) -> PlannedTest:
        """The runs that answer `question`, and their cost. Loads no weights.

        Args:
            steps: of each run, at most those of the whole run; None: what 300 s allow, at least 50.

        Raises:
            ConfigurationError: the question does not apply to this run.
        """
        build = {"rate": self._change_rate, "rank": self._change_rank, "targets": self._widen, "epoch": self._continue}
        changes = build[question]()
        schedule, is_epoch = self._plan.schedule, question == "epoch"
        total = schedule.steps_per_epoch if is_epoch else schedule.total_steps
        if not changes:
            return PlannedTest(question, changes, 0, total, ())
        first = self._plan.config.training.seed + is_epoch  # an added epoch takes the rows in another order
        seeds = 2 if len(changes) == 2 else 3  # so that each test has two degrees of freedom
        test = PlannedTest(question, changes, 0, total, tuple(range(first, first + seeds)))
        speed = float(np.median([line["tokens"] / max(line["seconds"], 1e-9) for line in self._log]))  # tokens/s
        per_step = test.runs * float(self._plan.train.lengths.mean()) * schedule.global_batch
        validated = FORWARD * (test.runs + 1) * int(self._rows.lengths.sum())
        affordable = int((BUDGET_SECONDS * speed - validated) / max(1.0, per_step))
        steps = min(total, steps or max(LEAST_STEPS, affordable))
        tokens = round(per_step * steps)
        return replace(test, steps=steps, tokens=tokens, seconds=(tokens + validated) / speed)

    def _change_rate(self) -> Changes:
        """Three times the rate, and a third of it."""
        own = self._plan.config.training.lr
        assert own is not None
        rates = {"higher": float(f"{own * FACTOR:.3g}"), "lower": float(f"{own / FACTOR:.3g}")}
        return {
            name: (f"training.lr={rate:g}", self._plan.config.replace_keys(training={"lr": rate}))
            for name, rate in rates.items()
            if rate <= 1
        }

    def _change_rank(self) -> Changes:
        """Twice the rank, and half of it, where the layers are wide enough; `lora_alpha` stays."""
        self._require_fresh_adapter()
        peft, changes = self._plan.config.peft, Changes()
        for name, factor in {"doubled": 2.0, "halved": 0.5}.items():
            ranks = {key: max(1, int(rank * factor)) for key, rank in {"": peft.r, **peft.rank_pattern}.items()}
            r = ranks.pop("")
            config = self._plan.config.replace_keys(peft={"r": r, "rank_pattern": ranks})
            try:
                self._check_adapter(config)
            except AdapterError as error:
                logger.warning("rank %d is not tested: %s", r, error)
                continue
            if r != peft.r:
                changes[name] = (f"peft.r={r}" + (" with peft.rank_pattern alike" if ranks else ""), config)
        return changes

    def _widen(self) -> Changes:
        """Every linear layer; nothing if those are adapted."""
        self._require_fresh_adapter()
        config = self._plan.config.replace_keys(peft={"target_modules": "auto"})
        adaptation = self._check_adapter(config)
        added = set(adaptation.adapted) - set(self._plan.adaptation.adapted)
        return {"widened": ("peft.target_modules=auto", config)} if added else {}

    def _check_adapter(self, config: TrainingConfig) -> Adaptation:
        skeleton = build_skeleton(config.model, config.data.new_tokens)
        return check_adapter(skeleton, config.peft, self._plan.new_ids)

    def _require_fresh_adapter(self) -> None:
        if self._plan.config.peft.from_adapter:
            raise ConfigurationError(
                "--test rank and targets: this run continued a saved adapter, whose rank and modules hold. Test "
                "the run that made it."
            )

    def _continue(self) -> Changes:
        """One more epoch from the run's adapter, with a schedule of its own."""
        self._run.require_adapter()
        peft = self._plan.config.peft
        kept = {"lora_dropout": peft.lora_dropout, "lora_plus_ratio": peft.lora_plus_ratio}
        continued = adopt_saved_settings(PeftSection(from_adapter=str(self._run.adapter), **kept))
        values = {**self._plan.config.explicit_values(), "peft": continued.explicit_values()}
        config = TrainingConfig.model_validate(values).replace_keys(training={"epochs": 1.0, "max_steps": None})
        return {"continued": (f"peft.from_adapter={self._run.run_id} training.epochs=1", config)}

    def measure(self, planned: Sequence[PlannedTest]) -> tuple[Intervention, ...]:
        """Check that the run repeats, run every test, and save the answers beside the run's captures.

        Cost: as planned, and memory as of the run.

        Raises:
            TrainingError: a loss that the run recorded does not come out again, so no test of it could be trusted.
        """
        with explain_out_of_memory(self._plan.config):
            runner = PlanRunner(self._plan)
            if any(test.changes and test.question != "epoch" for test in planned):
                self._check_replay(runner)
            found = []
            for test in planned:
                found.append(self._answer(runner, test))
                write_interventions(self._run.lens, found)  # an interruption loses the test that runs alone
        return tuple(found)

    def _check_replay(self, runner: PlanRunner) -> None:
        """Compare the first losses of the run with the recorded ones."""
        recorded = {line["step"]: line["loss"] for line in self._log}
        for step, loss in enumerate(runner.replay(self._plan, REPLAYED_STEPS), 1):
            if step in recorded:
                self._require_same_loss(f"the loss of step {step}", loss, recorded[step])

    def _require_same_loss(self, what: str, loss: float, recorded: float) -> None:
        tolerance = SAME_LOSS[self._plan.precision]
        logger.debug("%s: %.8g, recorded %.8g", what, loss, recorded)
        if not abs(loss - recorded) <= tolerance * abs(recorded):
            raise TrainingError(
                f"--test: {what} is {loss:.6g} now, and the run recorded {recorded:.6g}: it does not repeat, so no "
                "test of it can be trusted. Its base, its rows or this program changed since. Test a new run."
            )

    def _answer(self, runner: PlanRunner, test: PlannedTest) -> Intervention:
        """Run one test. Rows are compared in pairs, seed by seed."""
        started, tokens, seeds = time.perf_counter(), self._rows.supervised_counts, test.seeds
        configs = {name: config for name, (_, config) in test.changes.items()}
        with self._progress.task(f"testing {test.question}", max(1, test.runs * test.steps)) as advance:
            if test.question == "epoch":
                control = [self._measure_adapter(runner, configs["continued"])] * len(seeds)
            else:
                own = (self._resize(self._plan.config, test, seed) for seed in seeds if configs)
                control = [runner.train(plan, self._rows, advance) for plan in own]
            losses: dict[str, np.ndarray | str] = {}
            for name, config in configs.items():
                try:
                    plans = (self._resize(config, test, seed) for seed in seeds)
                    losses[name] = np.stack([runner.train(plan, self._rows, advance) for plan in plans])
                except TrainingError as error:
                    losses[name] = str(error).partition(". ")[0]
        settings = {name: setting for name, (setting, _) in test.changes.items()}
        base = runner.measure_base(self._rows)
        return Intervention(
            test.question,
            test.steps,
            test.total_steps,
            seeds,
            len(self._rows),
            base_loss=float(base.sum() / tokens.sum()),
            loss=float(np.mean(control, 0).sum() / tokens.sum()) if control else float(base.sum() / tokens.sum()),
            changes=measure_changes(settings, np.stack(control), losses, tokens) if control else (),
            tokens=test.tokens,
            seconds=time.perf_counter() - started,
        )

    def _measure_adapter(self, runner: PlanRunner, config: TrainingConfig) -> np.ndarray:
        """The losses of the run's own adapter, after a check that they are those which it recorded."""
        nll = runner.train(replace(self._plan, config=config), self._validation, steps=0)
        if (recorded := self._summary.get("validation_loss")) is not None:
            loss = float(nll.sum() / self._validation.supervised_counts.sum())
            self._require_same_loss("the validation loss of its adapter", loss, recorded)
        own: np.ndarray = nll[self._positions]
        return own

    def _resize(self, config: TrainingConfig, test: PlannedTest, seed: int) -> RunPlan:
        """The plan with this config and seed for the test's steps, its warm-up and decay shrunk in proportion."""
        warmup = round(count_warmup_steps(config.training, test.total_steps) * test.steps / test.total_steps)
        training = {"seed": seed, "max_steps": test.steps, "warmup_steps": warmup}
        schedule = replace(self._plan.schedule, seed=seed, max_steps=test.steps)
        return replace(self._plan, config=config.replace_keys(training=training), schedule=schedule)
