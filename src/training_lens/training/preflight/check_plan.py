"""All checks of a planned run on its tokenized rows. To add one, write a rule and a check, and list the check here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from training_lens.analysis.findings.finding import Finding
from training_lens.evaluation.verdict import ORDER
from training_lens.training.plan import RunPlan
from training_lens.training.preflight.new_token_check import check_new_tokens
from training_lens.training.preflight.row_checks import (
    TRUNCATED,
    UNKNOWN,
    check_disagreement,
    check_duplicates,
    check_end_tokens,
    check_padding,
    check_supervised_prompts,
    check_targets,
    check_truncation,
    check_unknown_characters,
)
from training_lens.training.preflight.row_scan import scan_rows
from training_lens.training.preflight.split_checks import check_domains, check_leaks, check_resemblance
from training_lens.training.preflight.text_checks import check_random_text
from training_lens.utils.integrity import write_sealed
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
FILE = "preflight.json"  # in the run's reports
LOGGED_BY_SPLITS = frozenset({TRUNCATED.code, UNKNOWN.code})  # reading the rows has said so


def check_plan(plan: RunPlan) -> tuple[Finding, ...]:
    """The finding of every check, most severe first.

    Cost: four passes over the tokens in numpy, a chunk at a time; no weights are loaded.

    Raises:
        DatasetError: nothing can be learned, or all validation rows are training rows.

    Example:
        for finding in check_plan(TrainingWrapper(config).plan()):
            print(finding.severity, finding.title, finding.measured, finding.action)
    """
    assert plan.config.model.seq_len is not None
    seq_len = plan.config.model.seq_len
    data, report = plan.config.data, plan.splits["train"].report
    vocabulary = plan.facts.vocabulary + max(0, len(plan.tokenizer) - plan.facts.vocabulary)
    train = scan_rows(plan.train, plan.tokenizer, vocabulary, plan.new_ids)
    check_targets(train)
    found = [
        check_supervised_prompts(train, data.mask_prompt, seq_len),
        check_end_tokens(train),
        check_padding(train),
        check_unknown_characters(train, report),
        check_truncation(train, report, seq_len),
        check_duplicates(train, plan.schedule),
        check_disagreement(train),
        check_random_text(train),
    ]
    if data.new_tokens:
        found.append(check_new_tokens(plan.train, data.new_tokens, plan.new_ids))
    if plan.validation is not None:
        validation = scan_rows(plan.validation, plan.tokenizer, vocabulary, plan.new_ids)
        found += [check_leaks(train, validation), check_resemblance(train, validation)]
        found += filter(None, [check_domains(plan.train, plan.validation)])
    return sort_findings(found)


def sort_findings(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, most severe first."""
    return tuple(sorted(found, key=lambda each: ORDER.index(each.severity)))


def log_findings(found: Sequence[Finding]) -> None:
    """Log problems and warnings, each with what to do, but for those that reading the rows has logged."""
    for each in found:
        if each.severity in ("problem", "warning") and each.code not in LOGGED_BY_SPLITS:
            logger.warning("%s: %s. %s", each.title, each.measured, each.action)


def write_findings(found: Sequence[Finding], reports: Path) -> None:
    """Write preflight.json into a run's folder of reports."""
    write_sealed(reports / FILE, {"findings": [asdict(each) for each in found]})
