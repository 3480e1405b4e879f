"""Rows to examples: chats, prompt-answer pairs and plain texts, by the source's field mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from training_lens.config.data_sections import DataSection
from training_lens.data.examples import Example, Message, Role, Row, Turns
from training_lens.data.fields import FieldMapping, domain_from_file
from training_lens.data.messages import is_chat, mark_learned, mask_row, read_answers, read_chat, read_flag
from training_lens.data.notes import DataNotes
from training_lens.data.row_keys import DOMAIN_KEYS, EMPTY_VALUES, KeyCheck, ignore_option, plain_name, row_schema
from training_lens.data.tool_calls import Tool, read_tools
from training_lens.data.values import describe_value, look_up_value, parse_json, read_optional_text, read_text
from training_lens.errors import DatasetError

# Literal end marks that exports leave at the end of answers; the tokenizer's own end token is put there anyway.
END_MARKS = (
    *("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"),
    *("<eos>", "<end_of_turn>", "<|end|>", "<|eot|>"),
)


class RowReader:
    """Reads the rows of one source by its field mapping; `notes` collects what it ignores."""

    def __init__(
        self, mapping: FieldMapping, data: DataSection, source: str = "", notes: DataNotes | None = None
    ) -> None:
        self.mapping = mapping
        self._per_file, self._learn_context = data.domain.per_file, data.supervise == "all"
        used = (mapping.domain or ("domain" if data.domain.field == "auto" else None), mapping.rejected, *mapping.masks)
        self._level = row_schema(mapping.row_form, mapping.key_by_meaning, [key for key in used if key])
        self._keys = KeyCheck(source, notes or DataNotes(), data.ignore_keys)
        self._label_is_set = data.fields.label is not None
        self._nested = [key for key in mapping.key_by_meaning.values() if "." in key]
        self._may_offer_domain = mapping.domain is None and not data.domain.per_file and data.domain.field == "auto"

    def read_row(self, row: Row) -> Example:
        """The row as an example.

        Raises:
            DatasetError: a required field is missing, null, empty or not text; a key is refused; names the row.
        """
        self._keys.check_keys(row.place, self._level, row.values)
        for key in self._nested:
            self._count_unused_siblings(row, key)
        if self._may_offer_domain:
            self._offer_domain(row)
        messages, tools = self._read_turns(row)
        domain = read_text(row, self.mapping.domain).strip() if self.mapping.domain else None
        domain = domain_from_file(row.file) if self._per_file else domain
        is_text = self.mapping.row_form == "text"
        return Example(messages, domain, row.file, row.number, tools, is_text=is_text)

    def _offer_domain(self, row: Row) -> None:
        """Remark on a field of the first row that could serve as the domain."""
        self._may_offer_domain = False
        key = next((key for key in row.values if plain_name(key) in DOMAIN_KEYS), None)
        if key and key not in self.mapping.key_by_meaning.values():
            self._keys.add_remark(
                f"'{key}' is not used; data.domain.field={key} makes it the domain, and with data.domain.style=raw its "
                "value stands before the prompt as it is"
            )

    def _count_unused_siblings(self, row: Row, key: str) -> None:
        """Count what a dotted key does not reach: sibling keys, and other items of lists."""
        if key in row.values:
            return
        value: Any = row.values
        path = ""
        for name in key.split("."):
            if not isinstance(value, Mapping):
                return
            for other in value if path else ():
                if other != name:
                    self._keys.count_unused(path + str(other))
            value, path = value.get(name), f"{path}{name}."
            if isinstance(value, list):
                if value[1:]:
                    self._keys.add_remark(f"of several items in '{path[:-1]}' the first is read")
                value = value[0] if value else None

    def _read_turns(self, row: Row) -> tuple[Turns, tuple[Tool, ...]]:
        mapping = self.mapping
        if mapping.text:
            text = (Message("assistant", read_text(row, mapping.text)),)
            return mask_row(row, mapping.masks, text, False), ()
        tools = read_tools(row, mapping.tools)
        own, masked = self._read_chat(row, tools) if mapping.messages else self._read_pair(row, tools)
        own = mask_row(row, mapping.masks, own, masked)
        turns = self._prepend_system(row, (*self._read_history(row, own), *own))
        if turns[0].role in ("assistant", "tool"):
            raise DatasetError(
                f"{row.place}: '{mapping.history or mapping.messages or mapping.instruction}' begins with a message of "
                f"the {turns[0].role}; nothing asks for it. Begin with a user or system message."
            )
        if turns[-1].role != "assistant":
            raise DatasetError(
                f"{row.place}: '{mapping.output or mapping.messages}' ends with a {turns[-1].role} message; nothing "
                "follows that could be learned. End it with an assistant message."
            )
        return self._apply_label(row, turns), tools

    def _read_chat(self, row: Row, tools: Sequence[Tool]) -> tuple[Turns, bool]:
        """The turns of a chat row, and whether any of them carries a loss mask."""
        key, output = str(self.mapping.messages), self.mapping.output
        turns, masked = read_chat(row, key, look_up_value(row.values, key), self._keys)
        if output and turns[-1].role == "assistant":
            for unused in (output, self.mapping.rejected):
                if unused and look_up_value(row.values, unused) is not None:
                    self._keys.count_unused(unused)
            return turns, masked
        if output:
            answers, also = read_answers(row, output, tools, self._keys)
            turns, masked = (*turns, *answers), masked or also
        self._note_rejected()
        return turns, masked

    def _read_pair(self, row: Row, tools: Sequence[Tool]) -> tuple[Turns, bool]:
        """The turns of a prompt-answer row, and whether any of them carries a loss mask."""
        asked = self._read_prompt(row)
        answers, masked = read_answers(row, str(self.mapping.output), tools, self._keys)
        self._note_rejected()
        if answers[0].role in ("system", "user"):
            answers = self._require_prompt_in_chat(row, asked, answers)
            asked = ()
        return (*asked, *answers), masked

    def _read_prompt(self, row: Row) -> Turns:
        """The prompt: text with an optional second part, or a chat."""
        key = str(self.mapping.instruction)
        second = read_optional_text(row, self.mapping.input)
        value = look_up_value(row.values, key)
        if not is_chat(value):
            return (Message("user", read_text(row, key), second),)
        turns, _ = read_chat(row, key, value, self._keys)
        if second and turns[-1].role != "user":
            raise DatasetError(f"{row.place}: '{self.mapping.input}' has no user message in '{key}' to stand with.")
        turns = (*turns[:-1], replace(turns[-1], input=second)) if second else turns
        return self._mask_context(turns, key)

    def _mask_context(self, turns: Turns, key: str) -> Turns:
        """Earlier turns, as context: they are learned only with data.supervise=all."""
        if self._learn_context or not any(m.role == "assistant" for m in turns):
            return turns
        self._keys.add_remark(f"answers in '{key}' are shown and not learned; data.supervise=all learns them, too")
        return mark_learned(turns, [False] * len(turns))

    def _read_history(self, row: Row, own: Turns) -> Turns:
        """The earlier turns of a row, pairs or messages; masked if the row's own answers are."""
        key = self.mapping.history
        value = look_up_value(row.values, key) if key else None
        if key is None or value in EMPTY_VALUES:
            return ()
        if isinstance(value, str):
            value = parse_json(f"{row.place}, '{key}'", value, "earlier turns in JSON")
        if isinstance(value, list) and not all(isinstance(turn, Mapping) for turn in value):
            wrong = [pair for pair in value if not isinstance(pair, list | tuple) or len(pair) != 2]
            if wrong:
                raise DatasetError(
                    f"{row.place}: '{key}' holds {describe_value(wrong[0])}, expected pairs [prompt, answer], or "
                    "messages with role and content."
                )
            roles: tuple[Role, ...] = ("user", "assistant")
            value = [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
        turns = self._mask_context(read_chat(row, key, value, self._keys)[0], key)
        is_learned = any(m.learn for m in own if m.role == "assistant")
        return turns if is_learned else mark_learned(turns, [False] * len(turns))

    def _require_prompt_in_chat(self, row: Row, asked: Turns, answers: Turns) -> Turns:
        """An answer that is a whole chat; it must contain the prompt before its last answers."""
        prompt, chat = [m.text for m in asked], [m.text for m in answers]
        is_held = any(chat[start : start + len(prompt)] == prompt for start in range(len(chat)))
        if any(m.input for m in asked) or not is_held:
            raise DatasetError(
                f"{row.place}: '{self.mapping.output}' is a whole chat, and it does not hold the prompt in "
                f"'{self.mapping.instruction}'. Give the answer alone, or the chat alone."
            )
        return answers

    def _prepend_system(self, row: Row, turns: Turns) -> Turns:
        """The turns after the system message from the row's own field; the same one in both is taken once."""
        key = self.mapping.system
        text = read_optional_text(row, key)
        if key is None or not text:
            return turns
        own = next((m.text for m in turns if m.role == "system"), None)
        if own is None:
            return (Message("system", text), *turns)
        if own.strip() != text.strip():
            raise DatasetError(
                f"{row.place}: '{key}' and the chat's own system message differ. Keep one of them, or train without "
                f"the field: {ignore_option(key)}."
            )
        return turns

    def _note_rejected(self) -> None:
        if self.mapping.rejected:
            answer = self.mapping.output or self.mapping.messages
            self._keys.add_remark(f"'{answer}' is learned, '{self.mapping.rejected}' is set aside")

    def _apply_label(self, row: Row, turns: Turns) -> Turns:
        """The turns, of which nothing is learned where the row's label calls its answer unwanted."""
        key = self.mapping.label
        value = look_up_value(row.values, key) if key else None
        if key is None or value is None:
            return turns
        wanted = read_flag(value)
        if wanted is None:
            self._keys.count_unused(key)
            return turns
        if type(value) in (int, float) and not self._label_is_set:
            raise DatasetError(
                f"{row.place}: '{key}' is {value!r}, which may say that an answer is not wanted, or name a class. "
                f"If 0 means not to be learned: data.fields.label={key}; else: {ignore_option(key)}."
            )
        if wanted:
            return turns
        self._keys.add_remark(f"rows whose '{key}' is false are set aside: their answers are not learned")
        return mark_learned(turns, [False] * len(turns))


def strip_end_marks(example: Example) -> tuple[Example, list[str]]:
    """The example without literal end marks after its answers, and the removed marks."""
    marks: list[str] = []
    messages = list(example.messages)
    for i, message in enumerate(messages):
        text = message.text.rstrip()
        if message.role == "assistant" and text.endswith(END_MARKS):
            marks.append(next(mark for mark in END_MARKS if text.endswith(mark)))
            messages[i] = replace(message, text=text.removesuffix(marks[-1]))
    return (replace(example, messages=tuple(messages)) if marks else example), marks
