"""Ollama's Modelfile: the chat template as Ollama's own language has it, and the stop tokens of training.

Ollama reads Go templates. Only what every chat template shares can be translated without reading it: a text before and
after what each role says. These texts are found by rendering small chats, and checked on longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training_lens.data.examples import Message
from training_lens.errors import TrainingLensError
from training_lens.inference.session import Session

USER, ANSWER, SECOND, SYSTEM = "Wq7 one", "Wq8 two", "Wq9 three", "Wq6 four"  # in no template
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class ChatPieces:
    """The texts around what each role says; the one after a user's message begins the answer."""

    start: str
    before_user: str
    after_user: str
    after_answer: str
    around_system: tuple[str, str] | None = None  # None: the template has no system messages, or puts them elsewhere

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, as Ollama renders it."""
        around = {"user": (self.before_user, self.after_user), "assistant": ("", self.after_answer)}
        around["system"] = self.around_system or ("", "")
        return self.start + "".join(around[m.role][0] + m.text + around[m.role][1] for m in messages)

    def as_go_template(self) -> str:
        """The same as a template of Ollama."""
        user = f'if eq .Role "user" }}}}{self.before_user}{{{{ .Content }}}}{self.after_user}'
        answer = f'else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.after_answer}'
        if self.around_system:
            before, after = self.around_system
            user = f'if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ else {user}'
        return f"{self.start}{{{{ range .Messages }}}}{{{{ {user}{{{{ {answer}{{{{ end }}}}{{{{ end }}}}"


def write_modelfile(session: Session, source: Sequence[str]) -> str:
    """The text of a Modelfile.

    Args:
        source: its first lines, which name the files.
    """
    template = _build_template(session)
    lines = [*source, *([f'TEMPLATE """{template}"""'] if template else [NO_TEMPLATE])]
    stops = sorted({str(session.tokenizer.convert_ids_to_tokens(i)) for i in session.stop_ids})
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    lines += [f"PARAMETER num_ctx {session.config.model.seq_len}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


NO_TEMPLATE = "# Ollama's template language cannot express the run's template: send rendered prompts, with raw=true."


def _build_template(session: Session) -> str | None:
    if session.continues_text:
        return "{{ .Prompt }}"

    def render(messages: Sequence[Message]) -> str:
        text = "".join(segment.text for segment in session.renderer.render_prompt(messages, None))
        return text.removeprefix(session.tokenizer.bos_token or "")  # llama.cpp puts it there

    pieces = find_chat_pieces(render)
    found = pieces.as_go_template() if pieces else None
    texts = pieces.render([Message("user", "")]) if pieces else ""
    return None if found is None or "{{" in texts or '"""' in found else found


def find_chat_pieces(render: Render) -> ChatPieces | None:
    """The texts around each role's message, or None where a prompt is not made of such pieces.

    Args:
        render: gives the prompt for messages that end with the user's.
    """
    user, answer, second = Message("user", USER), Message("assistant", ANSWER), Message("user", SECOND)
    try:
        first, longer = render([user]), render([user, answer, second])
        before, after_user = first.split(USER)
        head, rest = longer.split(USER)
        after_first, rest = rest.split(ANSWER)
        between, tail = rest.split(SECOND)
    except (TrainingLensError, ValueError):
        return None
    before_user = _common_end(before, between)
    start, after_answer = before.removesuffix(before_user), between.removesuffix(before_user)
    pieces = ChatPieces(start, before_user, after_user, after_answer)
    if head != before or not after_user == after_first == tail or pieces.render([user, answer, second]) != longer:
        return None
    return _add_system(pieces, render)


def _add_system(pieces: ChatPieces, render: Render) -> ChatPieces:
    """The pieces with those around a system message, where it stands before the first message as a piece of its own."""
    system, user, answer = Message("system", SYSTEM), Message("user", USER), Message("assistant", ANSWER)
    end = pieces.before_user + USER + pieces.after_user
    try:
        before, after = render([system, user]).split(SYSTEM)
        found = ChatPieces(
            **{**vars(pieces), "around_system": (before.removeprefix(pieces.start), after.removesuffix(end))}
        )
        chats = [system, user], [system, user, answer, user]
        is_same = before.startswith(pieces.start) and all(found.render(chat) == render(chat) for chat in chats)
    except (TrainingLensError, ValueError):
        return pieces
    return found if is_same else pieces


def _common_end(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-length - 1] == second[-length - 1]:
        length += 1
    return first[len(first) - length :]
