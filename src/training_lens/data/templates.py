"""Examples to text: one renderer for training, evaluation and inference.

A rendered example is a list of segments, each tokenized on its own. The prompt's segments come from the same call in
training and at inference, so both see the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from training_lens.config.data_sections import DataSection
from training_lens.data.chat import ChatTemplate, special_names
from training_lens.data.types import Example, Message, Segment
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
DomainStyle = Literal["tag", "hash", "raw", "none"]
JINJA = (".jinja", ".jinja2", ".j2")
# Names of special tokens inside data stand as (mark, number, mark) while a template renders: noncharacters of Unicode.
# Where a template writes JSON in ASCII, they stand escaped.
OPEN, CLOSE, ESCAPED = "\ufdd0", "\ufdd1", r"\ufdd0"
_SLOT = re.compile(r"\{(\w+)\}")
_PLACEHOLDER = re.compile(rf"(?:{OPEN}|\\ufdd0)(\d+)(?:{CLOSE}|\\ufdd1)")


class Template(Protocol):
    """Turns the messages of a chat into segments, which together are the rendered text."""

    tools: bool  # whether it has a place for tools, calls and their results

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int] = ()
    ) -> list[Segment]:
        """Everything up to where the assistant begins to answer; `messages` end with another's.

        `learned` are the earlier answers that training learns: the text is cut at them as there.
        """
        ...

    def example(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int]
    ) -> list[Segment]:
        """The whole chat; the answers at the positions `learned` are responses, each with its end token."""
        ...


class TurnTemplate(ABC):
    """A template of words: each turn is a lead, the answer, the end token; turns are parted by a blank line.

    Subclasses say the lead. `end` is the tokenizer's EOS as text.
    """

    tools = False

    def __init__(self, end: str) -> None:
        self._end = end

    @abstractmethod
    def lead(self, system: str | None, asked: Message, first: bool) -> str:
        """What stands before an answer to `asked`."""

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int] = ()
    ) -> list[Segment]:
        return self._turns(messages, ())

    def example(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], learned: Collection[int]
    ) -> list[Segment]:
        return self._turns(messages, learned)

    def _turns(self, messages: Sequence[Message], learned: Collection[int]) -> list[Segment]:
        system = "\n\n".join(m.text for m in messages if m.role == "system") or None
        segments: list[Segment] = []
        text, first = "", True
        for index, message in enumerate(messages):
            if message.role == "assistant":
                segments += [Segment(text, False)] if text else []
                segments.append(Segment(message.text + self._end, index in learned))
                text = "\n\n"
            elif message.role != "system":
                text += self.lead(system, message, first)
                first = False
        return [*segments, Segment(text, False)] if messages[-1].role != "assistant" else segments


class AlpacaTemplate(TurnTemplate):
    """Stanford Alpaca's form (github.com/tatsu-lab/stanford_alpaca); a system message replaces the first sentence."""

    WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    WITHOUT_INPUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )

    def lead(self, system: str | None, asked: Message, first: bool) -> str:
        opening = (system or (self.WITH_INPUT if asked.input else self.WITHOUT_INPUT)) + "\n\n" if first else ""
        extra = f"### Input:\n{asked.input}\n\n" if asked.input else ""
        return f"{opening}### Instruction:\n{asked.text}\n\n{extra}### Response:\n"


class PlainTemplate(TurnTemplate):
    """Nothing but the row's own texts, a line break between prompt and answer."""

    def lead(self, system: str | None, asked: Message, first: bool) -> str:
        return "\n".join(part for part in (system if first else None, asked.text, asked.input) if part) + "\n"


class PatternTemplate(TurnTemplate):
    """A user's own pattern: text with {instruction}, perhaps {system} and {input}, and at its end {output}.

    A line whose slots are all empty is left out, but for the last.
    """

    SLOTS = ("system", "instruction", "input", "output")

    def __init__(self, pattern: str, end: str) -> None:
        super().__init__(end)
        text = pattern.replace("\\n", "\n").rstrip("\n")
        _check_pattern(text)
        lines = text.removesuffix("{output}").split("\n")
        self._lines = [(line, _SLOT.findall(line)) for line in lines]

    def lead(self, system: str | None, asked: Message, first: bool) -> str:
        values = {"system": system if first else "", "instruction": asked.text, "input": asked.input}
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


def domain_prefix(domain: str | None, style: DomainStyle) -> str:
    """What stands before the first user message: '[domain: law] ', 8 hexadecimal digits of its sha256, or itself."""
    if domain is None or style == "none":
        return ""
    if style == "hash":
        return f"[{hashlib.sha256(domain.encode()).hexdigest()[:8]}] "
    return f"{domain} " if style == "raw" else f"[domain: {domain}] "


class Renderer:
    """Template, domain style and supervision together: the only way from messages to text.

    Args:
        supervise: 'all' learns every answer (but those with loss weight 0), 'last' the last one.
        end: the tokenizer's EOS as text, for plain texts, which no template touches.
        special: names of special tokens; where one stands in data it stays text. Empty allows them.
    """

    def __init__(
        self,
        template: Template,
        style: DomainStyle,
        *,
        end: str,
        supervise: Literal["all", "last"] = "all",
        special: Collection[str] = (),
    ) -> None:
        self.template, self._style, self._supervise, self._end = template, style, supervise, end
        self._special = sorted(special, key=len, reverse=True)  # the longest first: one may begin another
        self._names = re.compile("|".join(map(re.escape, self._special))) if special else None
        self._noted: set[str] = set()

    def prompt(
        self, messages: Sequence[Message], domain: str | None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Segment]:
        """What the model sees before it answers; `messages` end with the user's or a tool's."""
        messages, tools = self._fitted(self._with_domain(messages, domain), tools)
        learned = self._learned(messages) if self._supervise == "all" else ()
        return self._restored(self.template.prompt(messages, tools, learned))

    def prompt_of(self, example: Example) -> list[Segment]:
        """The prompt of the example's last answer; of a plain text, its domain prefix."""
        if example.is_text:
            return self.text_prompt("", example.domain)
        return self.prompt(example.messages[:-1], example.domain, example.tools)

    def example(self, example: Example) -> list[Segment]:
        """The whole example, to the end of its last learned answer.

        Raises:
            DatasetError: the template cannot render it; names the row.
        """
        if example.is_text:
            return self._text(example)
        try:
            messages, tools = self._fitted(self._with_domain(example.messages, example.domain), example.tools)
            segments = self.template.example(messages, tools, self._learned(messages))
        except DatasetError as error:
            raise DatasetError(f"{example.file}, row {example.row}: {error}") from error
        while segments and not segments[-1].response:  # what follows the last answer teaches nothing
            segments.pop()
        return self._restored(segments)

    def _learned(self, messages: Sequence[Message]) -> tuple[int, ...]:
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        return tuple(i for i in (answers if self._supervise == "all" else answers[-1:]) if messages[i].learn)

    def _text(self, example: Example) -> list[Segment]:
        message = example.messages[0]
        if not message.learn:
            return []
        segment = Segment(self._protected(message.text) + self._end, True)
        return [*self.text_prompt("", example.domain), *self._restored([segment])]

    def text_prompt(self, text: str, domain: str | None) -> list[Segment]:
        """What stands before the rest of a plain text that begins with `text`: its domain's prefix, no template."""
        parts = (domain_prefix(domain, self._style), text)
        return self._restored([Segment(self._protected(part), False) for part in parts if part])

    def _with_domain(self, messages: Sequence[Message], domain: str | None) -> list[Message]:
        prefix = domain_prefix(domain, self._style)
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if prefix and first is None:
            raise DatasetError(f"domain '{domain}': there is no user message to put its prefix on.")
        put = [replace(m, text=prefix + m.text) if prefix and i == first else m for i, m in enumerate(messages)]
        return [self._safe(m) for m in put] if self._names else put

    def _safe(self, m: Message) -> Message:
        """The message with the names of special tokens protected, in what it says and in what it calls."""
        assert self._names
        if not (m.calls or self._names.search(m.text) or self._names.search(m.input)):
            return m  # nearly every message; a copy of each would take as long as the rest of its rendering
        calls = tuple(self._protected_in(call) for call in m.calls)
        return replace(m, text=self._protected(m.text), input=self._protected(m.input), calls=calls)

    def _protected_in(self, value: Any) -> Any:
        """`value` with every text in it protected."""
        if isinstance(value, str):
            return self._protected(value)
        if isinstance(value, Mapping):
            return {self._protected_in(k): self._protected_in(v) for k, v in value.items()}
        return [self._protected_in(v) for v in value] if isinstance(value, list | tuple) else value

    def _fitted(
        self, messages: list[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Message], Sequence[Mapping[str, Any]]]:
        """The chat as this template can say it: without a place for tools, they and their use become text."""
        tools = [self._protected_in(tool) for tool in tools]
        if self.template.tools or not (tools or any(m.role == "tool" or m.calls for m in messages)):
            return messages, tools
        self._note("the template has no place for tools: their descriptions go into the system message, calls are")
        fitted = [_as_text(m) for m in messages]
        if not tools:
            return fitted, ()
        described = "\n".join(["You may call these tools:", *(_json(tool["function"]) for tool in tools)])
        system = "\n\n".join([*(m.text for m in fitted if m.role == "system"), described])
        return [Message("system", system), *(m for m in fitted if m.role != "system")], ()

    def _note(self, what: str) -> None:
        if what not in self._noted:
            self._noted.add(what)
            logger.warning("%s learned as JSON, and results come as user messages", what)

    def _protected(self, text: str) -> str:
        """`text` with the names of special tokens as placeholders, which no template knows."""
        if self._names is None or not self._names.search(text):
            return text
        return self._names.sub(lambda name: f"{OPEN}{self._special.index(name[0])}{CLOSE}", text)

    def _restored(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments with each placeholder as plain text of its own."""
        if not any(OPEN in segment.text or ESCAPED in segment.text for segment in segments):
            return list(segments)
        return [
            Segment(self._special[int(part)] if odd else part, segment.response, plain=bool(odd))
            for segment in segments
            for place, part in enumerate(_PLACEHOLDER.split(segment.text))
            if (odd := place % 2) or part
        ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_text(message: Message) -> Message:
    """The message without calls and tools: what it calls is said as JSON, a tool's result is the user's."""
    said = "\n".join(part for part in (message.text, *map(_json, message.calls_without_ids)) if part)
    return replace(message, text=said, calls=(), role="user" if message.role == "tool" else message.role)


def choose_template(asked: str, tokenizer: Any) -> str:
    """The template that `asked` means: `auto` is chat where the tokenizer carries a chat template, else alpaca."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_chat:
        raise ConfigurationError(
            "data.template: 'chat' needs a tokenizer with a chat template, this one has none; use alpaca, plain, "
            "a .jinja file or a pattern of your own."
        )
    if asked == "auto":
        return "chat" if has_chat else "alpaca"
    return asked


def adopt_template_file(asked: str, tokenizer: Any) -> None:
    """Where `asked` is a .jinja file, give it to the tokenizer as its chat template: saved with the run.

    Raises:
        ConfigurationError: it cannot be read, or is no valid Jinja; names the line.
    """
    if not asked.endswith(JINJA):
        return
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        source = Path(asked).expanduser().read_text(encoding="utf-8")
        _compile_jinja_template(source)
    except OSError as error:
        raise ConfigurationError(f"data.template: '{asked}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"data.template: '{asked}' is not UTF-8 text.") from error
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"data.template: {asked}, line {error.lineno}: {error.message}.") from error
    tokenizer.chat_template = source


def build_renderer(data: DataSection, tokenizer: Any) -> Renderer:
    """The renderer that the data section asks for; a .jinja file must have been adopted by the tokenizer."""
    name, end = choose_template(data.template, tokenizer), tokenizer.eos_token or ""
    template: Template
    if name == "chat" or name.endswith(JINJA):
        template = ChatTemplate(tokenizer, data.thinking)
    elif name in ("alpaca", "plain"):
        template = (AlpacaTemplate if name == "alpaca" else PlainTemplate)(end)
    else:
        template = PatternTemplate(name, end)
    special = special_names(tokenizer) if data.special_tokens == "plain" else ()
    supervise: Literal["all", "last"] = "last" if data.supervise == "last" else "all"
    return Renderer(template, data.domain.style, end=end, supervise=supervise, special=special)
