"""Compile chat templates in transformers' sandbox, and render them with a fixed date."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from training_lens.errors import ConfigurationError
from training_lens.utils.limits import TEMPLATE_BYTES, read_bytes
from training_lens.utils.names import expand_home

Span = tuple[int, int]
CLOCK = "strftime_now"  # the function by which chat templates ask for the date
TOOL_USE, DEFAULT = "tool_use", "default"  # transformers' names of the templates for chats with tools, and without
_MARKS = re.compile(r"\{%-?\s*generation\b")


class JinjaTemplate:
    """A chat template, compiled once.

    Args:
        variables: variables besides the chat: the tokenizer's special tokens by name.
        today: the date that `strftime_now` returns.

    Raises:
        ConfigurationError: invalid Jinja; names the line.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], today: date) -> None:
        self._compiled = _compile_template(source, "the tokenizer's chat template")
        self._variables = {**variables, CLOCK: today.strftime}
        self.has_marks = bool(_MARKS.search(source))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], generation: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and its spans inside generation marks (adjacent ones merged).

        Raises:
            Exception: a template is foreign code and may fail in any way.
        """
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        chat = {"messages": list(messages), "tools": list(tools) or None, "documents": None}
        variables = {**self._variables, **chat, "add_generation_prompt": generation}
        self._compiled.environment.start_rendering()
        if not self.has_marks:
            return self._compiled.render(**variables), []
        text, marks = _render_with_assistant_indices(self._compiled, **variables)
        return text, _join_adjacent_spans(marks)


def shows_date(source: str) -> bool:
    """Whether any branch of the template shows the date."""
    return re.search(rf"\b{CLOCK}\b", source) is not None


def choose_source(templates: str | Mapping[str, str], with_tools: bool) -> str:
    """The template's text; of several named ones, the one that transformers would take.

    Raises:
        ConfigurationError: none of several is the default.
    """
    if isinstance(templates, str):
        return templates
    if DEFAULT not in templates:
        raise ConfigurationError(
            f"data.template: the tokenizer has chat templates named {', '.join(templates)}, and none named {DEFAULT}. "
            "Give one as a .jinja file."
        )
    return templates[TOOL_USE if with_tools and TOOL_USE in templates else DEFAULT]


def read_template_file(path: str) -> str:
    """The text of a .jinja file.

    Raises:
        ConfigurationError: unreadable or invalid Jinja; names the line.
    """
    try:
        source = read_bytes(expand_home(path), TEMPLATE_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"data.template: '{path}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"data.template: '{path}' is not UTF-8 text.") from error
    _compile_template(source, path)
    return source


def _compile_template(source: str, name: str) -> Any:
    """The template in the environment in which transformers compiles chat templates, with limits."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from training_lens.data.jinja_limits import BoundedEnvironment

    try:
        return BoundedEnvironment(_compile_jinja_template("").environment).from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"data.template: {name}, line {error.lineno}: {error.message}.") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigurationError(f"data.template: {name}: is nested too deep to be compiled.") from error


def _join_adjacent_spans(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
