"""What to do with a run now: the steps that fit its status and its verdict, the best one first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from training_lens.evaluation.verdict import Verdict

MORE_ROWS, MEASURE = "data.validation=FILE", "evaluation.decide_by="  # in a verdict's next command


@dataclass(frozen=True)
class NextStep:
    """One step: a command that can be copied, or a place in the dashboard.

    `name` continues the sentence 'you can ...', `words` say what for. `place` is a page, or a section of the run's page
    as '#findings'; reports without a server have no pages.
    """

    name: str
    words: str
    command: str = ""
    place: str = ""


def list_next_steps(name: str, status: str, verdict: Verdict) -> list[NextStep]:
    """The steps for a run that commands call `name`, whose verdict's next command calls it so, too."""
    if status in ("interrupted", "failed"):
        return [NextStep("finish it", "Finish it", f"training-lens train --resume {name}")]
    return list(_list_steps(name, verdict)) if status == "finished" else []


def _list_steps(name: str, verdict: Verdict) -> Iterator[NextStep]:
    playground = NextStep("try it in the playground", "Ask base and adapter the same, side by side", place="playground")
    command = verdict.next_command
    if command.startswith("training-lens compare"):
        yield NextStep("measure it", _describe_measuring(command), command)
    elif command.startswith("training-lens report"):
        yield NextStep("see what was found", "See what was found, with its evidence", place="#findings")
        if verdict.outcome != "better":
            yield NextStep("train with other settings", "Train it with other settings", place="new")
    yield playground
    if verdict.outcome == "better" and verdict.basis == "comparison":
        merge = f"training-lens merge --run {name}"
        yield NextStep("merge it", "Write the model with the adapter merged into it", merge)
        yield NextStep("serve it", "Answer the OpenAI API with it", f"training-lens serve {name}")
        yield NextStep("push it", "Put it on the Hugging Face hub", f"training-lens push {name} OWNER/NAME")


def _describe_measuring(command: str) -> str:
    if MORE_ROWS in command:
        return "Measure it on more rows, since these are too few or undecided"
    if MEASURE in command:
        return "Decide by another measure"
    return "Measure it on the held-out rows, with intervals"
