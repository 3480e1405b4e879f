"""Prompts that hold their own answer: a model would learn to copy, and could not answer where there is nothing to copy.

Extraction and choice are tasks, too: an answer that is a small part of a long prompt gives nothing away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from training_lens.data.examples import Example
from training_lens.errors import DatasetError
from training_lens.utils.files import hash_bytes

FEWEST_ROWS = 8  # with fewer, a shared text may be chance
SHOWN_ROWS, SHOWN_TEXT = 3, 60


def is_copied_answer(example: Example) -> bool:
    """Whether the last answer is one of its prompt's texts, at least half of all of them, or the end of the last.

    White space does not matter. Earlier answers and tool results are no part of the prompt here: repeating them is
    what chats do.

    Example:
        >>> from training_lens.data.examples import Message
        >>> turns = Message("user", "What is 2 + 2? It is 4"), Message("assistant", "It is 4")
        >>> is_copied_answer(Example(turns, None, "rows.jsonl", 1))
        True
    """
    *asked, last = example.messages
    answer = " ".join(last.text.split())
    texts = [text for m in asked if m.role in ("user", "system") for text in (m.text, m.input) if text]
    if not answer or last.calls or sum(map(len, texts)) < len(answer):
        return False
    texts = [" ".join(text.split()) for text in texts]
    if not any(answer in text for text in texts):
        return False
    if answer in texts or 2 * len(answer) >= sum(map(len, texts)):
        return True
    before = texts[-1].removesuffix(answer)
    return len(before) < len(texts[-1]) and not before[-1:].isalnum()


@dataclass
class CopiedAnswers:
    """Counts the rows of each source whose prompt holds the answer.

    `kinds` are hashes of different copied answers: labels that every prompt lists at its end are few.
    """

    asked: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, set[int]] = field(default_factory=dict)

    def count_examples(self, examples: Sequence[Example]) -> None:
        """Count examples before they are tokenized; those without a prompt are passed over."""
        for example in examples:
            if example.is_text:
                continue
            self.asked[example.file] += 1
            if is_copied_answer(example):
                self.copied[example.file] += 1
                self.kinds.setdefault(example.file, set()).add(hash_bytes(example.messages[-1].text.strip().encode()))
                shown = self.shown.setdefault(example.file, [])
                if len(shown) < SHOWN_ROWS:
                    shown.append(_describe_row(example))

    def refuse_copies(self, mappings: dict[str, str]) -> None:
        """Refuse a source whose prompts hold their answers in most rows.

        Args:
            mappings: how each source was read.

        Raises:
            DatasetError: names rows, and the settings.
        """
        for source, count in self.copied.items():
            rows = self.asked[source]
            if rows < FEWEST_ROWS or 2 * count <= rows or 2 * len(self.kinds[source]) < count:
                continue
            raise DatasetError(
                f"{source}, read as {mappings[source]}: the answer of {count} of {rows} rows stands in its own prompt, "
                f"so only copying would be learned: {'; '.join(self.shown[source])}. Name the fields of prompt and "
                "answer (data.fields.*), or take the answers out of the prompts. If copying is the task: "
                "data.answer_in_prompt=allow."
            )


def _describe_row(example: Example) -> str:
    prompt, answer = (" ".join(m.text.split()) for m in (example.messages[-2], example.messages[-1]))
    prompt = prompt if len(prompt) <= SHOWN_TEXT else f"...{prompt[-SHOWN_TEXT:]}"
    answer = answer if len(answer) <= SHOWN_TEXT else f"{answer[:SHOWN_TEXT]}..."
    return f"row {example.row}: {prompt!r} -> {answer!r}"
