"""What the sampled answers of a run show: repetition, missing ends, and answers that ignore their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training_lens.analysis.findings.finding import Finding, Rule

LEAST_ANSWERS = 2  # of the samples that show a symptom: one answer is no rule
SHARE = 0.5
SOURCE = "a few greedy answers are no rate: training-lens compare measures it on many rows"
LOOP_RULE = Rule(
    code="repetition",
    signature="greedy answers that repeat the same tokens again and again where the right ones do not",
    threshold=f"{SHARE:.0%} of the answers, at least {LEAST_ANSWERS}, and more than of the base's, after half of the "
    "run",
    source=SOURCE,
    action="lower training.lr or train for fewer epochs (training.epochs); look at the rows for repeated text",
)
END_RULE = Rule(
    code="endless_answers",
    signature="greedy answers without an end token where the right answer ends far earlier",
    threshold=f"{SHARE:.0%} of the answers, at least {LEAST_ANSWERS}, cut at twice the right answer's length or 16 "
    "tokens beyond it, after half of the run",
    source=SOURCE,
    action="check that the end token is supervised (training-lens validate)",
)
PROMPT_RULE = Rule(
    code="prompt_ignored",
    signature="the same greedy answer to different prompts whose right answers differ",
    threshold="all answers are equal, to at least three prompts with two right answers, after half of the run",
    source=SOURCE,
    action="check the field mapping and the template: the prompt may lack what the answer depends on",
)


def check_answers(answers: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The symptoms of answers to fixed prompts, in the later half of a run: before it, good runs show them as well.

    Args:
        answers: `samples` of a line of logs/samples.jsonl; `base`: those of the base model, empty if unknown.
    """
    found = (
        _find_share(LOOP_RULE, "The answers repeat themselves", "loops", True, answers, base),
        _find_share(END_RULE, "The answers do not end", "ended", False, answers, ()),
        _find_equal_answers(answers),
    )
    return [finding for finding in found if finding is not None]


def _find_share(
    rule: Rule,
    title: str,
    key: str,
    is_bad: bool,
    answers: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
) -> Finding | None:
    """The rule's symptom if enough of the answers for which it is known have it.

    A note: greedy answers of a small or a young model loop in good runs as well.
    """
    known = [answer for answer in answers if answer.get(key) is not None]
    bad = [answer for answer in known if answer[key] is is_bad]
    if len(bad) < max(LEAST_ANSWERS, SHARE * len(known)) or sum(a.get(key) is is_bad for a in base) >= len(bad):
        return None
    measured = f"{len(bad)} of {len(known)} sampled answers, such as {str(bad[0]['generated'])[:80]!r}"
    return rule.report_symptom("note", title, measured, decide=SOURCE, evidence={"ids": [a["id"] for a in bad]})


def _find_equal_answers(answers: Sequence[Mapping[str, Any]]) -> Finding | None:
    given, right, prompts = ({str(a[key]).strip() for a in answers} for key in ("generated", "expected", "prompt"))
    if len(prompts) < 3 or len(right) < 2 or len(given) > 1 or all(answer.get("loops") for answer in answers):
        return None  # answers that loop are a finding of their own
    measured = f"all {len(answers)} sampled answers are {next(iter(given))[:80]!r}"
    return PROMPT_RULE.report_symptom("warning", "The adapter ignores its prompt", measured, decide=SOURCE)
