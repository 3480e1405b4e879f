"""A finished run judged on its validation rows: base and adapter answer the same prompts, with a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training_lens.config.schema import EvaluationSection, InferenceSection
from training_lens.data.preparation import prompt_as_trained, tokenize
from training_lens.data.store import TokenDataset
from training_lens.data.types import Example
from training_lens.evaluation.comparison import Answers, Comparison, compare, wrong_domains
from training_lens.evaluation.evaluator import evaluate_loss
from training_lens.inference.generator import answers
from training_lens.inference.rows import validation_examples
from training_lens.inference.session import Session, open_run
from training_lens.models.adapters import base_only
from training_lens.utils.processes import Processes
from training_lens.utils.progress import Progress
from training_lens.utils.runs import RunFolder

SPARE_TOKENS = 16  # generated beyond the longest reference: an answer that goes on past it is wrong anyway


@dataclass(frozen=True)
class Judgement:
    """The scores, and the rows and answers that they are of."""

    comparison: Comparison
    examples: list[Example]
    base: Answers
    adapter: Answers


def compare_run(
    run: RunFolder, settings: EvaluationSection, progress: Progress, device: str | None = None
) -> Judgement:
    """Base against adapter on the run's validation rows.

    Args:
        device: as `model.device`; None takes the run's.

    Raises:
        ConfigurationError: the run had no validation rows.
    """
    session = open_run(run, device)
    examples = validation_examples(run, session, settings.max_examples)
    base = _answers_of(session, examples, settings, progress, "base", base=True)
    adapter = _answers_of(session, examples, settings, progress, "adapter")
    controls: dict[str, Answers] = {}
    if len({e.domain for e in examples}) > 1 and session.config.data.domain.style != "none":
        told: dict[str, Sequence[str | None]] = {
            "wrong_domain": wrong_domains(examples),
            "no_domain": [None] * len(examples),
        }
        for name, domains in told.items():
            asked = [replace(e, domain=d) for e, d in zip(examples, domains, strict=True)]
            controls[name] = _answers_of(session, asked, settings, progress, f"adapter, {name.replace('_', ' ')}")
    return Judgement(compare(examples, base, adapter, controls), examples, base, adapter)


def _answers_of(
    session: Session,
    examples: list[Example],
    settings: EvaluationSection,
    progress: Progress,
    who: str,
    *,
    base: bool = False,
) -> Answers:
    dataset = TokenDataset.of([t for t in tokenize(examples, session.preparation) if t is not None])
    processes = Processes(session.device)
    with progress.task(f"loss of the {who}", len(dataset)) as advance, base_only(session.model, base):
        loss = evaluate_loss(
            session.model, dataset, processes, session.precision, settings.batch_tokens, session.pad_id, advance
        )
    asked = [i for i, e in enumerate(examples) if not e.is_text]  # a plain text asks nothing
    prompts = [prompt_as_trained(examples[i], session.preparation) for i in asked]
    longest = max(int(n) for n in dataset.supervised)
    limit = min(settings.max_new_tokens, longest + SPARE_TOKENS)
    greedy = InferenceSection(max_new_tokens=limit, batch_tokens=settings.batch_tokens)
    with progress.task(f"answers of the {who}", len(prompts)) as advance:
        said = dict(zip(asked, answers(session, prompts, greedy, base=base, advance=advance), strict=True))
    return Answers([said.get(i, "") for i in range(len(examples))], loss)
