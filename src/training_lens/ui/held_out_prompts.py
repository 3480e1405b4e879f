"""A prompt of a random held-out row, for the playground: what the adapter was evaluated on and did not learn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from training_lens.config.run_config import read_run_config
from training_lens.data.examples import Example, Message
from training_lens.errors import ConfigurationError
from training_lens.runs.run_folder import RunFolder
from training_lens.ui.playground_request import LONGEST_PROMPT

if TYPE_CHECKING:
    from training_lens.config.data_sections import DataSection

MOST_ROWS = 1000  # that are drawn from: the first of the held-out ones


@dataclass(frozen=True)
class HeldOutPrompt:
    """A row's last prompt, the turns before it, and the answer that the row has."""

    row: str
    prompt: str
    before: tuple[Message, ...]
    domain: str | None
    expected: str

    def as_json(self) -> dict[str, Any]:
        before = [{"role": message.role, "content": join_parts(message)} for message in self.before]
        return {**vars(self), "before": before}


def has_held_out(run: RunFolder) -> bool:
    """Whether the run had validation rows."""
    return bool(run.read_metadata("data.json").get("validation_examples"))


def draw_held_out_prompt(run: RunFolder) -> HeldOutPrompt:
    """The prompt of a random held-out row of a run.

    Raises:
        ConfigurationError: none of them can be asked here.
        DatasetError: they are gone, or have changed since.
    """
    from training_lens.data.sources import HUB

    data = read_run_config(run).data
    sources = data.train if data.val_ratio else data.validation_sources
    if any(str(source).startswith(HUB) for source in sources):
        raise ConfigurationError("the held-out rows are on a hub, which the dashboard does not ask.")
    prompts = list(_read_prompts(run, data))
    if not prompts:
        raise ConfigurationError("no held-out row ends with one question and its answer.")
    return random.choice(prompts)


def _read_prompts(run: RunFolder, data: DataSection) -> Iterator[HeldOutPrompt]:
    from training_lens.inference.heldout_examples import read_validation_rows

    for example in islice(read_validation_rows(run, data), MOST_ROWS):
        found = split_text(example) if example.is_text else split_chat(example)
        if found and len(found.prompt) <= LONGEST_PROMPT:
            yield found


def split_text(example: Example) -> HeldOutPrompt | None:
    """The first half of a text as a prompt, and the rest as what is expected; None of a single word."""
    words = example.messages[0].text.split(" ")
    half = len(words) // 2
    if not half:
        return None
    prompt, rest = " ".join(words[:half]), " ".join(words[half:])
    return HeldOutPrompt(example.id, prompt, (), example.domain, rest)


def split_chat(example: Example) -> HeldOutPrompt | None:
    """The last question of a chat and its answer; None where something else than a question comes before the answer."""
    if [message.role for message in example.messages[-2:]] != ["user", "assistant"]:
        return None
    if example.tools or any(message.calls or message.role == "tool" for message in example.messages):
        return None  # the playground offers no tools
    *before, asked, answer = example.messages
    return HeldOutPrompt(example.id, join_parts(asked), tuple(before), example.domain, answer.text)


def join_parts(message: Message) -> str:
    """A turn's text, with the second part that some instruction data has, as chat templates write them."""
    return f"{message.text}\n{message.input}" if message.input else message.text
