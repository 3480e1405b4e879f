"""Text templates: Stanford Alpaca, plain, and user-defined patterns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from training_lens.data.examples import Message, TextSegment
from training_lens.errors import ConfigurationError

Tools = Sequence[Mapping[str, Any]]
_SLOT = re.compile(r"\{(\w+)\}")


class TurnTemplate(ABC):
    """A text template: each turn is a lead, the answer and the end token; a blank line separates turns.

    Subclasses define the lead. `end` is the tokenizer's EOS as text.
    """

    shows_tools = shows_calls = shows_results = False

    name: str  # for error messages
    way_out = "Use a template that shows it (data.template=FILE.jinja)"

    def __init__(self, end: str) -> None:
        self._end = end

    def list_remarks(self, messages: Sequence[Message]) -> Iterator[str]:
        """None: messages are used as they are."""
        yield from ()

    @abstractmethod
    def build_lead(self, system: str | None, asked: Message, first: bool) -> str:
        """The text before the answer to `asked`, with the turn's `system` message; `first` marks the first turn."""

    def render_prompt(
        self, messages: Sequence[Message], tools: Tools, learned: Collection[int] = ()
    ) -> list[TextSegment]:
        return self.render_example(messages, tools, ())

    def render_example(self, messages: Sequence[Message], tools: Tools, learned: Collection[int]) -> list[TextSegment]:
        segments: list[TextSegment] = []
        turn: list[Message] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                turn.append(message)
                continue
            segments += self._render_lead(turn, first=not segments)
            segments.append(TextSegment(message.text + self._end, index in learned))
            turn = []
        return segments + (self._render_lead(turn, first=not segments) if turn else [])

    def _render_lead(self, turn: Sequence[Message], first: bool) -> list[TextSegment]:
        """The text before the answer to the messages of a turn."""
        system = "\n\n".join(m.text for m in turn if m.role == "system") or None
        asked = [m for m in turn if m.role != "system"]
        leads = [self.build_lead(system if i == 0 else None, m, first and i == 0) for i, m in enumerate(asked)]
        text = ("" if first else "\n\n") + "".join(leads)
        return [TextSegment(text, False)] if text else []


class AlpacaTemplate(TurnTemplate):
    """Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca); a system message replaces the first sentence."""

    name = "the template alpaca"
    WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    WITHOUT_INPUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )

    def build_lead(self, system: str | None, asked: Message, first: bool) -> str:
        task = (self.WITH_INPUT if asked.input else self.WITHOUT_INPUT) if first else None
        opening = f"{system or task}\n\n" if system or task else ""
        extra = f"### Input:\n{asked.input}\n\n" if asked.input else ""
        return f"{opening}### Instruction:\n{asked.text}\n\n{extra}### Response:\n"


class PlainTemplate(TurnTemplate):
    """Only the row's texts, with a line break between prompt and answer."""

    name = "the template plain"

    def build_lead(self, system: str | None, asked: Message, first: bool) -> str:
        return "\n".join(part for part in (system, asked.text, asked.input) if part) + "\n"


class PatternTemplate(TurnTemplate):
    """A user-defined pattern: text with {instruction}, optionally {system} and {input}, and {output} at the end.

    A line whose slots are all empty is left out, except the last.

    Raises:
        ConfigurationError: an unknown slot, or no valid prompt and answer.
    """

    way_out = "Give the pattern a place for it ({system} or {input})"
    SLOTS = ("system", "instruction", "input", "output")

    def __init__(self, pattern: str, end: str) -> None:
        super().__init__(end)
        self.name = f"the pattern {pattern!r}"
        text = pattern.replace("\\n", "\n").rstrip("\n")
        _check_pattern(text)
        lines = text.removesuffix("{output}").split("\n")
        self._lines = [(line, _SLOT.findall(line)) for line in lines]

    def build_lead(self, system: str | None, asked: Message, first: bool) -> str:
        values = {"system": system, "instruction": asked.text, "input": asked.input}
        *others, (last, _) = self._lines
        lines = [line for line, slots in others if not slots or any(values[slot] for slot in slots)]
        return _SLOT.sub(lambda slot: values[slot[1]] or "", "\n".join((*lines, last)))


def _check_pattern(text: str) -> None:
    slots = re.findall(r"\{(\w*)\}", text)
    unknown = [slot for slot in slots if slot not in PatternTemplate.SLOTS]
    problem = None
    if unknown:
        problem = f"has the slot {{{unknown[0]}}}; there are {', '.join(f'{{{s}}}' for s in PatternTemplate.SLOTS)}"
    elif "instruction" not in slots or slots.count("output") != 1:
        problem = "needs {instruction}, and {output} once"
    elif not text.endswith("{output}"):
        problem = "must end with {output}: the end token follows the answer"
    if problem:
        raise ConfigurationError(
            f"data.template: the pattern {text!r} {problem}. For example 'Q: {{instruction}}\\nA: {{output}}'."
        )
