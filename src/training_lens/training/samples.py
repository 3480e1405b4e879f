"""Sample answers during training: a few prompts at validations, at a bounded cost."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import TokenizedExample
from training_lens.data.fields import are_plain_texts
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.answer_endings import SPARE_TOKENS, has_loop
from training_lens.evaluation.evaluator import LossReport
from training_lens.inference.generator import GeneratedAnswer, generate_answers
from training_lens.inference.session import LoadedModel, Session, build_session
from training_lens.models.model_classes import evaluation_mode
from training_lens.training.loop.callbacks import JournalCallback, StepReport
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import autocast, free_memory, preserve_rng_state
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory

logger = get_logger(__name__)
OPENING = 8  # tokens of a text without a prompt that the model is given to continue
TOKEN_SHARE = 0.05  # of the run's training tokens, as of the validation sample: all answers together
PASS_SHARE = 1 / 3  # of a training token's cost: a forward pass without a backward one, which is twice as long
LEAST_TOKENS = 2048  # that all answers together may always take: some runs are shorter than their answers
TIME_SHARE, LEAST_SECONDS = 0.02, 5.0  # of the time since the start; what may always be spent


@dataclass(frozen=True)
class SamplePrompt:
    """The tokens before a row's first answer, and those of the expected answer; `id` is the row's."""

    id: str
    ids: list[int]
    expected: list[int]


class SampleAnswerer:
    """Answers a run's sample prompts greedily with the model in training, whose modes and random state are restored.

    The prompts are rows spread evenly over the validation set, or over the training rows if there is none.

    Args:
        plan: the run's, for its rows and tokenizer; `tracking.samples` and `tracking.sample_tokens` of its config.
    """

    def __init__(self, plan: RunPlan) -> None:
        tracking = plan.config.tracking
        self.prompts = select_prompts(plan.validation or plan.train, tracking.samples, tracking.sample_tokens)
        self.settings = InferenceSection(max_new_tokens=tracking.sample_tokens, batch_tokens=plan.micro_batch_tokens)
        self._plan = plan
        self._session: Session | None = None  # for the whole training, so that its decoder is built once

    def answer(self, trainer: Any, base: bool) -> tuple[list[GeneratedAnswer], Session]:
        """The answers of the model, or of its base, and the session that gave them."""
        session = self._session = self._session or self._open_session(trainer)
        with (
            evaluation_mode(trainer.model),
            preserve_rng_state(),
            autocast(trainer.processes.device, trainer.precision),
        ):
            answers = generate_answers(session, [prompt.ids for prompt in self.prompts], self.settings, base=base)
        session.decoders.clear_if_large(trainer.model)
        return answers, session

    def close(self) -> None:
        """Free the decoder."""
        self._session = None

    def _open_session(self, trainer: Any) -> Session:
        plan = self._plan
        texts = are_plain_texts(plan.splits["train"].report.mappings.values(), plan.config.data.fields)
        device = trainer.processes.device
        return build_session(LoadedModel(trainer.model, plan.tokenizer, device, trainer.precision), plan.config, texts)


class SampleWriter(JournalCallback):
    """Writes the model's greedy answers to a few prompts to samples.jsonl, at validations; at step 0 the base's.

    A line is `{"step", "base", "samples": [{"id", "prompt", "expected", "generated", "ended", "loops"}]}`. Without
    validation rows the answers come where a validation would be. Where answers at all validations would take more than
    `TOKEN_SHARE` of the training, they come at some of them, evenly spread; and none come while they have taken more
    than `TIME_SHARE` of the time. The base's and those of the last step always come. A failure is logged and does not
    end the run. Training is not affected.

    Args:
        path: the journal.
        plan: the run's.
    """

    def __init__(self, path: Path, plan: RunPlan) -> None:
        super().__init__(path)
        self._plan = plan
        self._answerer = SampleAnswerer(plan)
        self._steps: Collection[int] = ()
        self._started = self.seconds = 0.0
        self._is_slow = False

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        self._steps, self._started = self._choose_steps(trainer), time.perf_counter()
        if trainer.validation is None and trainer.state.step == 0:
            self._write_samples(trainer, 0, base=True)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if trainer.validation is None and trainer.is_validation_due(report.step):
            self._write_if_due(trainer, report.step)

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        if base:
            self._write_samples(trainer, step, base)
        else:
            self._write_if_due(trainer, step)

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self._write_if_due(trainer, step)

    def on_train_end(self, trainer: Any) -> None:
        super().on_train_end(trainer)
        self._answerer.close()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        super().on_exception(trainer, error)
        self._answerer.close()

    def _choose_steps(self, trainer: Any) -> frozenset[int]:
        """The steps after which there are answers, as far as tokens decide: the same for the same data and seed."""
        plan, steps = self._plan, _list_validations(trainer)
        trained = float(plan.train.lengths.mean()) * plan.schedule.epoch_examples
        trained *= plan.schedule.total_steps / plan.schedule.steps_per_epoch
        tokens = sum(len(prompt.ids) + self._answerer.settings.max_new_tokens for prompt in self._answerer.prompts)
        allowed = max(LEAST_TOKENS, TOKEN_SHARE * trained / PASS_SHARE)
        count = min(len(steps), max(1, int(allowed / tokens) - 1))  # besides those of the base
        return frozenset(steps[len(steps) * (i + 1) // count - 1] for i in range(count))

    def _write_if_due(self, trainer: Any, step: int) -> None:
        if step not in self._steps:
            return
        is_last = step == trainer.schedule.total_steps
        share = self.seconds / max(time.perf_counter() - self._started, self.seconds)
        is_slow = self.seconds > LEAST_SECONDS and share > TIME_SHARE
        if trainer.processes.is_base_sharded:  # all answer together
            is_slow = trainer.processes.from_main(is_slow)
        if is_last or not is_slow:
            self._write_samples(trainer, step, base=False)
        elif not self._is_slow:
            self._is_slow = True
            logger.info("step %d: no sampled answers, as those before took %.0f %% of the time", step, 100 * share)

    def _write_samples(self, trainer: Any, step: int, base: bool) -> None:
        started, ran_out = time.perf_counter(), False
        try:
            answers, session = self._answerer.answer(trainer, base)
            pairs = zip(self._answerer.prompts, answers, strict=True)
            samples = [self._describe_sample(prompt, given, session) for prompt, given in pairs]
            self._journal.write({"step": step, "base": base, "samples": samples})
            self.seconds += time.perf_counter() - started
            trainer.notify_callbacks("on_samples", step, samples, base)
        except Exception as error:
            logger.warning("step %d: no samples: %s Training continues.", step, describe_error(error))
            logger.debug("in the samples", exc_info=True)
            ran_out = is_out_of_memory(error)
            self._answerer.close()
        if ran_out:
            free_memory()

    def _describe_sample(self, prompt: SamplePrompt, given: GeneratedAnswer, session: Session) -> dict[str, Any]:
        decode = self._plan.tokenizer.decode
        expected = decode(prompt.expected, skip_special_tokens=True)
        texts = {"id": prompt.id, "prompt": decode(prompt.ids), "expected": expected, "generated": given.text}
        is_loop = has_loop(given.token_ids) and not has_loop(prompt.expected)
        return {**texts, "ended": self._find_end(prompt, given, session), "loops": is_loop}

    def _find_end(self, prompt: SamplePrompt, given: GeneratedAnswer, session: Session) -> bool | None:
        """Whether the answer ended; None where the right one does not, or takes as many tokens as were allowed."""
        if not prompt.expected or prompt.expected[-1] not in session.stop_ids:
            return None
        if given.finish_reason == "stop":
            return True
        length = len(prompt.expected)
        has_room = self._answerer.settings.max_new_tokens >= min(2 * length, length + SPARE_TOKENS)
        return False if has_room else None


def _list_validations(trainer: Any) -> Sequence[int]:
    """The steps after which a run validates all rows or the validation sample, ascending."""
    total, sample = trainer.schedule.total_steps, trainer.validation_sample
    intervals = [trainer.settings.eval_steps or trainer.schedule.steps_per_epoch]
    intervals += [] if sample is None else [sample.every]
    return sorted({total, *(step for every in intervals for step in range(every, total, every))})


def select_prompts(dataset: TokenDataset, count: int, tokens: int) -> list[SamplePrompt]:
    """Prompts of at most `count` rows, spread evenly over the dataset from its first to its last row.

    Args:
        tokens: most tokens of the expected answer of a text without a prompt, which has no end of its own.
    """
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    return [_cut_prompt(dataset[int(place)], tokens) for place in places]


def _cut_prompt(example: TokenizedExample, tokens: int) -> SamplePrompt:
    ids, mask = example.input_ids.tolist(), example.loss_mask
    start = int(mask[1:].argmax()) + 1  # the first token is no target
    if start > 1:
        end = start + int(np.append(~mask[start:], True).argmax())
    else:  # supervised from its start: a text without a prompt
        start = min(OPENING, max(1, len(ids) // 2))
        end = start + tokens
    return SamplePrompt(example.id, ids[:start], ids[start:end])
