"""A conversation: lines in, text out. The terminal belongs to the caller."""

from __future__ import annotations

from collections.abc import Callable

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.errors import TrainingLensError
from training_lens.inference.generator import answer
from training_lens.inference.session import Session
from training_lens.utils.formatting import did_you_mean

COMMANDS = {
    "/reset": "forget the conversation so far",
    "/base": "let the base answer, without the adapter; again: the adapter",
    "/domain": "with a NAME: set the domain; alone: clear it, and list those that are known",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D",
}


class Conversation:
    """Answers what the user types, line by line, and passes the text to `write` while it is generated.

    The conversation so far is part of every prompt. When it outgrows the model's positions, its oldest turns are
    dropped. A run that continues plain texts has no conversation: there each line is a prompt of its own.
    """

    def __init__(
        self,
        session: Session,
        settings: InferenceSection,
        write: Callable[[str], None],
        domain: str | None = None,
        base: bool = False,
    ) -> None:
        self._session, self._settings, self._write = session, settings, write
        self._domain, self._base = domain, base
        self._history: list[Message] = []

    def handle_line(self, line: str) -> bool:
        """Answer one line, or run the command in it; False when the user leaves."""
        line = line.strip()
        if line == "/quit":
            return False
        try:
            if line:
                self._run_command(line) if line.startswith("/") else self._ask_model(line)
        except TrainingLensError as error:
            self._write(f"{error}\n")
        return True

    def _ask_model(self, text: str) -> None:
        message = Message("user", text)
        self._session.prompt_ids([message], self._domain)  # a message that is too long by itself costs no history
        self._drop_old_turns(message)
        prompt_ids = self._session.prompt_ids([*self._history, message], self._domain)
        reply = answer(self._session, prompt_ids, self._settings, base=self._base, on_text=self._write)
        self._write("\n")
        if not self._session.continues_text:
            self._history += [message, Message("assistant", reply)]

    def _drop_old_turns(self, message: Message) -> None:
        """Drop the oldest turns until there is room for an answer."""
        turns, positions, session = len(self._history) // 2, self._session.positions, self._session
        while self._history and positions is not None:
            prompt = session.renderer.render_prompt([*self._history, message], self._domain)
            room = min(self._settings.max_new_tokens, positions // 2)
            if len(session.encoder.encode_prompt(prompt)) + room <= positions:
                break
            del self._history[:2]
        if dropped := turns - len(self._history) // 2:
            self._write(
                f"({dropped} of {turns} earlier turns dropped: the conversation outgrew the model's "
                f"{positions} positions; /reset forgets it all)\n"
            )

    def _run_command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        match name:
            case "/reset":
                self._history.clear()
                self._write("forgotten.\n")
            case "/base" if not self._session.has_adapter:
                self._write("there is no adapter here: the base answers.\n")
            case "/base":
                self._base = not self._base
                self._write(f"now the {'base' if self._base else 'adapter'} answers.\n")
            case "/domain":
                domain = argument.strip() or None
                self._session.check_domain(domain)
                self._domain = domain
                known = f" (this run knows {', '.join(self._session.domains)})" if self._session.domains else ""
                self._write(f"domain: {domain}\n" if domain else f"no domain{known}\n")
            case "/help":
                self._write("".join(f"{command:8} {what}\n" for command, what in COMMANDS.items()))
            case _:
                hint = did_you_mean(name, COMMANDS)
                self._write(f"there is no command {name}; /help lists them.{hint}\n")
