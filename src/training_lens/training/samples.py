"""Sample answers during training: a few prompts at every validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.answer_endings import SPARE_TOKENS, has_loop
from training_lens.evaluation.evaluator import LossReport
from training_lens.inference.generator import GeneratedAnswer, generate_answers
from training_lens.inference.session import LoadedModel, Session, are_plain_texts, build_session
from training_lens.models.model_classes import evaluation_mode
from training_lens.training.loop.callbacks import JournalCallback, StepReport
from training_lens.training.plan import RunPlan
from training_lens.utils.devices import autocast, free_memory
from training_lens.utils.formatting import describe_error
from training_lens.utils.logging import get_logger
from training_lens.utils.resource_errors import is_out_of_memory
from training_lens.utils.seeding import preserve_rng_state

logger = get_logger(__name__)
OPENING = 8  # tokens of a text without a prompt that the model is given to continue


@dataclass(frozen=True)
class SamplePrompt:
    """The tokens before a row's first answer, and those of the expected answer; `id` is the row's."""

    id: str
    ids: list[int]
    expected: list[int]


class SampleWriter(JournalCallback):
    """Writes the model's greedy answers to a few prompts to samples.jsonl, at every validation; at step 0 the base's.

    A line is `{"step", "base", "samples": [{"id", "prompt", "expected", "generated", "ended", "loops"}]}`. The prompts
    are rows spread evenly over the validation set, or over the training rows if there is none, at the steps where a
    validation would be. A failure is logged and does not end the run. Training is not affected: modes and random state
    are restored.

    Args:
        path: the journal.
        plan: the run's, for its rows and tokenizer; `tracking.samples` and `tracking.sample_tokens` of its config.
    """

    def __init__(self, path: Path, plan: RunPlan) -> None:
        tracking = plan.config.tracking
        super().__init__(path)
        self._plan = plan
        self._prompts = select_prompts(plan.validation or plan.train, tracking.samples, tracking.sample_tokens)
        self._settings = InferenceSection(max_new_tokens=tracking.sample_tokens, batch_tokens=plan.micro_batch_tokens)

    def on_train_start(self, trainer: Any) -> None:
        super().on_train_start(trainer)
        if trainer.validation is None and trainer.state.step == 0:
            self._write_samples(trainer, 0, base=True)

    def on_step_end(self, trainer: Any, report: StepReport) -> None:
        if trainer.validation is None and trainer.is_validation_due(report.step):
            self._write_samples(trainer, report.step, base=False)

    def on_evaluate(self, trainer: Any, step: int, report: LossReport, base: bool) -> None:
        self._write_samples(trainer, step, base)

    def on_evaluate_sample(self, trainer: Any, step: int, report: LossReport) -> None:
        self._write_samples(trainer, step, base=False)

    def _write_samples(self, trainer: Any, step: int, base: bool) -> None:
        device, precision, ran_out = trainer.processes.device, trainer.precision, False
        try:
            with evaluation_mode(trainer.model), preserve_rng_state(), autocast(device, precision):
                session = self._open_session(trainer)
                given = generate_answers(session, [prompt.ids for prompt in self._prompts], self._settings, base=base)
            samples = [self._describe_sample(*pair, session) for pair in zip(self._prompts, given, strict=True)]
            self._journal.write({"step": step, "base": base, "samples": samples})
            trainer.notify_callbacks("on_samples", step, samples, base)
        except Exception as error:
            logger.warning("step %d: no samples: %s Training continues.", step, describe_error(error))
            logger.debug("in the samples", exc_info=True)
            ran_out = is_out_of_memory(error)
        if ran_out:
            free_memory()

    def _open_session(self, trainer: Any) -> Session:
        plan = self._plan
        texts = are_plain_texts(plan.splits["train"].report.mappings.values(), plan.config.data.fields)
        device = trainer.processes.device
        return build_session(LoadedModel(trainer.model, plan.tokenizer, device, trainer.precision), plan.config, texts)

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
        has_room = self._settings.max_new_tokens >= min(2 * length, length + SPARE_TOKENS)
        return False if has_room else None


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
