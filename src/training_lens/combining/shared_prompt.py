"""Whether runs prompt alike: one adapter answers with one prompt, which must be that of all it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from training_lens.data.examples import Example, Message
from training_lens.data.notes import DataNotes
from training_lens.data.templates import Renderer, build_renderer
from training_lens.errors import ConfigurationError, DatasetError
from training_lens.inference.session import PROBE_TOOL, Session

USER, ANSWER = Message("user", "a"), Message("assistant", "b")
CHATS = ((USER, ANSWER), (Message("system", "s"), USER, ANSWER), (USER, ANSWER, USER, ANSWER))
DOMAINS, TOOLS = (None, "d"), ((), (PROBE_TOOL,))


def require_same_prompts(sessions: Sequence[Session], names: Sequence[str]) -> list[str]:
    """Compare what sessions make of the same chats, with and without system message, domain and tools.

    Returns:
        What differs and may be meant, a sentence each: dates in prompts, runs on plain text.

    Raises:
        ConfigurationError: text or tokens of a prompt, or the tokens that end an answer, differ.
    """
    first, notes = sessions[0], list[str]()
    for other, name in zip(sessions[1:], names[1:], strict=True):
        if other.config.data.date != first.config.data.date:
            notes.append(
                f"prompts show the date {other.config.data.date} in {name}, and {first.config.data.date} in "
                f"{names[0]}, which the combination takes"
            )
        if other.continues_text != first.continues_text:
            kinds = ["continues plain text" if s.continues_text else "answers prompts" for s in (first, other)]
            notes.append(f"{names[0]} {kinds[0]}, as the combination does, and {name} {kinds[1]}")
        _require_alike(first, other, names[0], name)
    return notes


def _require_alike(first: Session, other: Session, first_name: str, other_name: str) -> None:
    date = first.config.data.date
    renderer = build_renderer(other.config.replace_keys(data={"date": date}).data, other.tokenizer)
    for chat, domain, tools in product(CHATS, DOMAINS, TOOLS):
        example = Example(chat, domain, "", 0, tools)
        text, ids = _render(first.renderer, first, example)
        other_text, other_ids = _render(renderer, other, example)
        if text != other_text:
            raise ConfigurationError(
                f"{first_name} and {other_name} were trained with different prompts, and one adapter answers with one: "
                f"the same chat is {text!r} in the first, and {other_text!r} in the second. Train both with the same "
                "data.template and data.domain.style."
            )
        if ids != other_ids:
            raise ConfigurationError(
                f"{first_name} and {other_name} have different tokens for the same chat, {text!r}: {ids} and "
                f"{other_ids}. Combine runs with one tokenizer and the same data.special_tokens."
            )
    if first.continues_text == other.continues_text and first.stop_ids != other.stop_ids:
        raise ConfigurationError(
            f"answers end with the tokens {sorted(first.stop_ids)} in {first_name}, and {sorted(other.stop_ids)} in "
            f"{other_name}: one adapter ends them in one way. Train both with the same data.template."
        )


def _render(renderer: Renderer, session: Session, example: Example) -> tuple[str | None, list[int]]:
    """Text and tokens of an example; None where its template has no such chats."""
    try:
        segments: Any = renderer.render_example(example, DataNotes())  # a probe: nothing to log
    except DatasetError:
        return None, []
    return "".join(segment.text for segment in segments), session.encoder.encode_prompt(segments)
