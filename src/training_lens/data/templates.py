"""Render examples as text: one renderer for training, evaluation and inference.

A rendered example is a list of segments, each tokenized separately. Training and inference render prompts by the same
call, so both see the same tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from training_lens.config.data_sections import DataSection
from training_lens.data.chat_template import ChatTemplate, lost_content_error, special_token_names
from training_lens.data.completeness import contains_text, find_lost, omits_thoughts
from training_lens.data.examples import Example, Message, TextSegment
from training_lens.data.jinja import TOOL_USE, choose_source, read_template_file, shows_date
from training_lens.data.notes import DataNotes
from training_lens.data.tool_calls import fit_tools
from training_lens.data.turn_templates import AlpacaTemplate, PatternTemplate, PlainTemplate, Tools, TurnTemplate
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
DomainStyle = Literal["tag", "hash", "raw", "none"]
Template = ChatTemplate | TurnTemplate
JINJA = (".jinja", ".jinja2", ".j2")
THOUGHTS_LEFT_OUT = "{} leaves out the thoughts of earlier answers once a chat goes on; they are not learned"
NAMES_LEFT_OUT = "{} does not show who speaks: the names of messages ('name') are left out"
# While a template renders, a name is replaced by (mark, number, mark). The marks are Unicode noncharacters, which no
# template knows; in ASCII JSON they are escaped.
OPEN, CLOSE, ESCAPED = "\ufdd0", "\ufdd1", r"\ufdd0"
_PLACEHOLDER = re.compile(rf"(?:{OPEN}|\\ufdd0)(\d+)(?:{CLOSE}|\\ufdd1)")
# Anything that looks like a special token of some tokenizer.
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</s>|<(?:start|end)_of_[a-z]+>")


def find_foreign_marks(texts: Iterable[str], tokens: Collection[str]) -> list[str]:
    """Strings in the texts that look like special tokens but are not in `tokens`, sorted."""
    return sorted({mark for text in texts if "<" in text for mark in _MARK.findall(text)}.difference(tokens))


class SpecialText:
    """Keeps `names` of special tokens in texts from becoming tokens: placeholders, restored as plain text."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = sorted(names, key=len, reverse=True)  # the longest first: one may begin another
        self._found = re.compile("|".join(map(re.escape, self._names))) if names else None

    def protect_text(self, text: str) -> str:
        """`text` with the names as placeholders."""
        if self._found is None or not self._found.search(text):
            return text
        return self._found.sub(lambda name: f"{OPEN}{self._names.index(name[0])}{CLOSE}", text)

    def protect_message(self, m: Message) -> Message:
        """The message with the names protected, in texts and calls."""
        if self._found is None or not (m.calls or self._found.search(m.text) or self._found.search(m.input)):
            return m  # nearly every message; copying it would take as long as rendering it
        calls = tuple(self.protect_value(call) for call in m.calls)
        return replace(m, text=self.protect_text(m.text), input=self.protect_text(m.input), calls=calls)

    def protect_value(self, value: Any) -> Any:
        """`value` with every text in it protected."""
        if isinstance(value, str):
            return self.protect_text(value)
        if isinstance(value, Mapping):
            return {self.protect_value(k): self.protect_value(v) for k, v in value.items()}
        return [self.protect_value(v) for v in value] if isinstance(value, list | tuple) else value

    def restore_segments(self, segments: Sequence[TextSegment]) -> list[TextSegment]:
        """The segments, with each placeholder as a plain segment of its own."""
        if not any(OPEN in segment.text or ESCAPED in segment.text for segment in segments):
            return list(segments)
        return [
            TextSegment(self._names[int(part)] if odd else part, segment.response, plain=bool(odd))
            for segment in segments
            for place, part in enumerate(_PLACEHOLDER.split(segment.text))
            if (odd := place % 2) or part
        ]

    def restore_text(self, text: str) -> str:
        """`text` with the names restored, for error messages."""
        return _PLACEHOLDER.sub(lambda found: self._names[int(found[1])], text)


def domain_prefix(domain: str | None, style: DomainStyle) -> str:
    """The prefix of the first user message: '[domain: law] ', 8 hex digits of its sha256, or the domain itself."""
    if domain is None or style == "none":
        return ""
    if style == "hash":
        return f"[{hashlib.sha256(domain.encode()).hexdigest()[:8]}] "
    return f"{domain} " if style == "raw" else f"[domain: {domain}] "


@dataclass(frozen=True)
class FittedChat:
    """A chat that its template can render; `changes` describe tool content that had to become text."""

    template: Template
    messages: Sequence[Message]
    tools: Tools
    changes: Sequence[str]

    @property
    def remarks(self) -> list[str]:
        """Remarks on how it is passed to the template."""
        return [*self.changes, *self.template.list_remarks(self.messages)]


class Renderer:
    """Template, domain style and supervision: the only way from messages to text.

    `tool_template` renders chats with tools, if given. `supervise`: 'all' learns every answer that is not masked,
    'last' only the last one. `end` is the EOS as text, for plain texts, which have no template. `special` tokens stay
    plain text in data; if empty, they become tokens. `tokens` are all added ones.
    """

    def __init__(
        self,
        template: Template,
        style: DomainStyle,
        *,
        end: str,
        tool_template: Template | None = None,
        supervise: Literal["all", "last"] = "all",
        special: Collection[str] = (),
        tokens: Collection[str] = (),
    ) -> None:
        self.template, self.tool_template = template, tool_template or template
        self._style, self._supervise, self._end = style, supervise, end
        self._special, self._names_are_tokens, self._tokens = SpecialText(special), not special, tokens
        self._reported: set[str] = set()

    def render_prompt(self, messages: Sequence[Message], domain: str | None, tools: Tools = ()) -> list[TextSegment]:
        """The prompt that the model answers; `messages` end with the user's or a tool's.

        Raises:
            DatasetError: the template fails or drops content.
        """
        chat = self._fit_chat(messages, domain, tools)
        learned = self._find_learned_answers(chat.messages) if self._supervise == "all" else ()
        segments = chat.template.render_prompt(chat.messages, chat.tools, learned)
        self._check_complete(chat, segments, ())
        self._report_remarks(chat.remarks)
        return self._special.restore_segments(segments)

    def render_example_prompt(self, example: Example) -> list[TextSegment]:
        """The prompt of the example's last answer; for a plain text, its domain prefix."""
        if example.is_text:
            return self.render_text_prompt("", example.domain)
        return self.render_prompt(example.messages[:-1], example.domain, example.tools)

    def render_example(self, example: Example, notes: DataNotes | None = None) -> list[TextSegment]:
        """The example up to the end of its last learned answer. `notes` collect remarks; None logs each once.

        Raises:
            DatasetError: the template fails or drops content; names the row.
        """
        marks = find_foreign_marks((m.text for m in example.messages), self._tokens) if self._tokens else []
        foreign = [f"{mark!r} is no token of this tokenizer: it is read and learned as letters" for mark in marks]
        self._report_remarks(foreign, example.file, notes)
        if example.is_text:
            return self._render_text(example)
        changes: Sequence[str] = ()
        try:
            chat = self._fit_chat(example.messages, example.domain, example.tools)
            changes, learned = chat.changes, self._find_learned_answers(chat.messages)
            segments = chat.template.render_example(chat.messages, chat.tools, learned)
            thoughts = self._check_complete(chat, segments, learned)
        except DatasetError as error:
            note = f" ({'; '.join(changes)}.)" if changes else ""
            raise DatasetError(f"{example.file}, row {example.row}: {error}{note}", kind=error.kind) from error
        self._report_remarks([*chat.remarks, *thoughts], example.file, notes)
        while segments and not segments[-1].response:  # text after the last answer has no targets
            segments.pop()
        return self._special.restore_segments(segments)

    def _find_learned_answers(self, messages: Sequence[Message]) -> tuple[int, ...]:
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        return tuple(i for i in (answers if self._supervise == "all" else answers[-1:]) if messages[i].learn)

    def _render_text(self, example: Example) -> list[TextSegment]:
        message = example.messages[0]
        if not message.learn:
            return []
        ended = self._names_are_tokens and bool(self._end) and message.text.endswith(self._end)
        learned = TextSegment(self._special.protect_text(message.text) + ("" if ended else self._end), True)
        return [*self.render_text_prompt("", example.domain), *self._special.restore_segments([learned])]

    def render_text_prompt(self, text: str, domain: str | None) -> list[TextSegment]:
        """The prompt for a plain text that begins with `text`: the domain prefix, no template."""
        parts = [self._special.protect_text(part) for part in (domain_prefix(domain, self._style), text) if part]
        return self._special.restore_segments([TextSegment(part, False) for part in parts])

    def _fit_chat(self, messages: Sequence[Message], domain: str | None, tools: Tools) -> FittedChat:
        template = self.tool_template if tools else self.template
        safe_tools = [self._special.protect_value(tool) for tool in tools]
        safe_messages = [self._special.protect_message(m) for m in self._add_domain_prefix(messages, domain)]
        return FittedChat(template, *fit_tools(template, safe_messages, safe_tools))

    def _add_domain_prefix(self, messages: Sequence[Message], domain: str | None) -> Sequence[Message]:
        prefix = domain_prefix(domain, self._style)
        if not prefix:
            return messages
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if first is None:
            raise DatasetError(f"domain '{domain}': there is no user message to put its prefix on.")
        return [replace(m, text=prefix + m.text) if i == first else m for i, m in enumerate(messages)]

    def _check_complete(self, chat: FittedChat, segments: Sequence[TextSegment], learned: Collection[int]) -> list[str]:
        """Remarks on thoughts and names that were left out of the text; anything else that it lacks is an error."""
        text = "".join(segment.text for segment in segments)
        is_plain = not chat.tools and not any(m.calls or m.extra for m in chat.messages)
        if is_plain and all(m.text in text and m.input in text for m in chat.messages):
            return []  # nearly every row
        if lost := find_lost(text, chat.messages, chat.tools, learned):
            raise lost_content_error(chat.template.name, self._special.restore_text(lost), chat.template.way_out)
        names = (m.extra.get("name", "") for m in chat.messages if m.role != "tool")
        left_out = {
            THOUGHTS_LEFT_OUT: omits_thoughts(text, chat.messages),
            NAMES_LEFT_OUT: not all(contains_text(text, name) for name in names),
        }
        return [remark.format(chat.template.name) for remark, applies in left_out.items() if applies]

    def _report_remarks(self, remarks: Sequence[str], file: str = "", notes: DataNotes | None = None) -> None:
        for remark in remarks:
            if notes:
                notes.add_remark(file, remark)
            elif remark not in self._reported:
                self._reported.add(remark)
                logger.info("template: %s", remark)


def choose_template(asked: str, tokenizer: Any) -> str:
    """Resolve data.template: `auto` is chat if the tokenizer has a chat template, else alpaca."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_chat:
        raise ConfigurationError(
            "data.template: 'chat' needs a tokenizer with a chat template, this one has none; use alpaca, plain, "
            "a .jinja file or a pattern of your own."
        )
    if asked == "auto":
        return "chat" if has_chat else "alpaca"
    return asked


def load_template_file(asked: str, tokenizer: Any) -> None:
    """If `asked` is a .jinja file, set it as the tokenizer's chat template, so that it is saved with the run.

    Raises:
        ConfigurationError: unreadable or invalid Jinja; names the line.
    """
    if asked.endswith(JINJA):
        tokenizer.chat_template = read_template_file(asked)


def resolve_date(data: DataSection, tokenizer: Any) -> str | None:
    """The date for the chat template, YYYY-MM-DD: the configured one, else today if the template shows it. Logs it."""
    templates = tokenizer.chat_template if uses_chat_template(choose_template(data.template, tokenizer)) else ""
    has_date = any(map(shows_date, [templates] if isinstance(templates, str) else templates.values()))
    if not has_date:
        if data.date:
            logger.warning("data.date=%s changes nothing: the template does not show the date", data.date)
        return data.date
    today = data.date or date.today().isoformat()
    logger.info("the template shows today's date: it is %s (data.date), in training and at inference", today)
    return today


def build_renderer(data: DataSection, tokenizer: Any) -> Renderer:
    """The renderer for the data section; a .jinja file must be loaded first (`load_template_file`)."""
    name, end = choose_template(data.template, tokenizer), tokenizer.eos_token or ""
    template: Template
    tool_template: Template | None = None
    if uses_chat_template(name):
        template, tool_template = _build_chat_templates(data, tokenizer, name)
    elif name == "alpaca":
        template = AlpacaTemplate(end)
    elif name == "plain":
        template = PlainTemplate(end)
    else:
        template = PatternTemplate(name, end)
    special = special_token_names(tokenizer) if data.special_tokens == "plain" else ()
    return Renderer(
        template,
        data.domain.style,
        end=end,
        tool_template=tool_template,
        supervise="last" if data.supervise == "last" else "all",
        special=special,
        tokens={str(token) for token in tokenizer.added_tokens_decoder.values()} | special_token_names(tokenizer),
    )


def uses_chat_template(name: str) -> bool:
    """Whether a resolved `data.template` is a chat template in Jinja."""
    return name == "chat" or name.endswith(JINJA)


def _build_chat_templates(data: DataSection, tokenizer: Any, name: str) -> tuple[ChatTemplate, ChatTemplate]:
    """The templates for chats without and with tools; the same one, unless the tokenizer has several."""
    today = date.fromisoformat(data.date) if data.date else None
    called = f"the chat template {name}" if name.endswith(JINJA) else "the tokenizer's chat template"
    sources = [choose_source(tokenizer.chat_template, with_tools) for with_tools in (False, True)]
    first = ChatTemplate(tokenizer, sources[0], thinking=data.thinking, today=today, name=called)
    if sources[0] == sources[1]:
        return first, first
    called = f"{called} '{TOOL_USE}'"
    return first, ChatTemplate(tokenizer, sources[1], thinking=data.thinking, today=today, name=called)
