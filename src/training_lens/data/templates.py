"""Examples to text: one renderer for training, evaluation and inference.

A rendered example is a list of segments, each tokenized on its own. The prompt's segments come from the same call in
training and at inference, so both see the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from training_lens.data.types import Example, Message, Segment
from training_lens.errors import ConfigurationError, DatasetError

DomainStyle = Literal["tag", "hash", "none"]
TemplateName = Literal["alpaca", "chat"]


class Template(Protocol):
    """Turns the messages of a chat into segments."""

    def prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """Everything up to where the assistant begins to answer."""
        ...

    def turn(self, messages: Sequence[Message]) -> tuple[list[Segment], Segment]:
        """The prompt of the last message, an assistant's, and that message as the response."""
        ...


class AlpacaTemplate:
    """Stanford Alpaca's form (github.com/tatsu-lab/stanford_alpaca); a system message replaces the first sentence."""

    WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    WITHOUT_INPUT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )

    def prompt(self, messages: Sequence[Message]) -> list[Segment]:
        segments: list[Segment] = []
        text, system = "", next((m.text for m in messages if m.role == "system"), None)
        turns = [m for m in messages if m.role != "system"]
        for index, message in enumerate(turns):
            if message.role == "assistant":
                segments += [Segment(text, False), Segment(message.text, True)]
                text = "\n\n"
                continue
            if index == 0:
                text += (system or (self.WITH_INPUT if message.input else self.WITHOUT_INPUT)) + "\n\n"
            extra = f"### Input:\n{message.input}\n\n" if message.input else ""
            text += f"### Instruction:\n{message.text}\n\n{extra}### Response:\n"
        return [*segments, Segment(text, False)]

    def turn(self, messages: Sequence[Message]) -> tuple[list[Segment], Segment]:
        return self.prompt(messages[:-1]), Segment(messages[-1].text, True)


class ChatTemplate:
    """The tokenizer's own chat template, with masks found by rendering prefixes.

    For each assistant turn the chat is rendered up to it (with the generation prompt) and including it; what the
    second has more is the response. It is supervised through its end token, the first special token after the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ends = sorted({str(t) for t in tokenizer.all_special_tokens} | _added_special(tokenizer), key=len)

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        chat = [{"role": m.role, "content": f"{m.text}\n{m.input}" if m.input else m.text} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            roles = ", ".join(m.role for m in messages)
            raise DatasetError(
                f"the chat template refuses a chat of {roles}: {error}. Try data.template=alpaca."
            ) from error
        assert isinstance(text, str)
        return text

    def prompt(self, messages: Sequence[Message]) -> list[Segment]:
        segments: list[Segment] = []
        done = ""
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before, response = self._response(messages[: index + 1])
                segments += [Segment(self._after(done, before), False), Segment(response, True)]
                done = before + response
        return [*segments, Segment(self._after(done, self._render(messages, generation=True)), False)]

    def turn(self, messages: Sequence[Message]) -> tuple[list[Segment], Segment]:
        return self.prompt(messages[:-1]), Segment(self._response(messages)[1], True)

    def _response(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The text before the last message's answer, and the answer with its end token."""
        before = self._render(messages[:-1], generation=True)
        answer = self._after(before, self._render(messages, generation=False))
        text = messages[-1].text
        start = answer.find(text) if text in answer else answer.find(text.strip())
        if start < 0:
            raise DatasetError(
                "the chat template changes the assistant's text, so it cannot be found; use data.template=alpaca."
            )
        after = start + len(text if text in answer else text.strip())
        ends = [(answer.find(end, after), end) for end in self._ends if end in answer[after:]]
        if not ends:
            return before, answer[:after]  # the template closes turns with plain text: EOS is added when tokenizing
        position, end = min(ends)
        return before, answer[: position + len(end)]

    def _after(self, prefix: str, text: str) -> str:
        if not text.startswith(prefix):
            raise DatasetError(
                "the chat template renders a chat differently once it goes on, so the answer's place is not certain. "
                "Use data.template=alpaca."
            )
        return text[len(prefix) :]


def _added_special(tokenizer: Any) -> set[str]:
    """Special tokens such as end-of-turn marks that are not listed by name."""
    return {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(t, "special", False)}


def domain_prefix(domain: str | None, style: DomainStyle) -> str:
    """What stands before the first user message: '[domain: law] ', or 8 hexadecimal digits of sha256 of the domain."""
    if domain is None or style == "none":
        return ""
    if style == "hash":
        return f"[{hashlib.sha256(domain.encode()).hexdigest()[:8]}] "
    return f"[domain: {domain}] "


@dataclass(frozen=True)
class Renderer:
    """Template and domain style together: the only way from messages to text."""

    template: Template
    style: DomainStyle

    def prompt(self, messages: Sequence[Message], domain: str | None) -> list[Segment]:
        """What the model sees before it answers; `messages` end with the user's."""
        return self.template.prompt(self._with_domain(messages, domain))

    def example(self, example: Example) -> list[Segment]:
        """The whole example: its prompt, earlier answers, and the answer, each a segment.

        Raises:
            DatasetError: the template cannot render it; names the row.
        """
        try:
            prompt, response = self.template.turn(self._with_domain(example.messages, example.domain))
        except DatasetError as error:
            raise DatasetError(f"{example.file}, row {example.row}: {error}") from error
        return [*prompt, response]

    def _with_domain(self, messages: Sequence[Message], domain: str | None) -> list[Message]:
        prefix = domain_prefix(domain, self.style)
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if prefix and first is None:
            raise DatasetError(f"domain '{domain}': there is no user message to put its prefix on.")
        return [
            Message(m.role, prefix + m.text, m.input) if i == first and prefix else m for i, m in enumerate(messages)
        ]


def choose_template(asked: str, tokenizer: Any) -> TemplateName:
    """`auto` is chat where the tokenizer carries a chat template, else alpaca."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_chat:
        raise ConfigurationError(
            "data.template: 'chat' needs a tokenizer with a chat template, this one has none; use alpaca."
        )
    return "alpaca" if asked == "alpaca" or not has_chat else "chat"


def build_renderer(name: TemplateName, style: DomainStyle, tokenizer: Any) -> Renderer:
    """The renderer of a resolved template name."""
    return Renderer(ChatTemplate(tokenizer) if name == "chat" else AlpacaTemplate(), style)
