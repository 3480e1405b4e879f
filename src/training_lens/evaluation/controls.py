"""Changed prompts over the same answers: what an adapter loses on them shows what of the prompt it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from training_lens.data.examples import Example, Message

WRONG_DOMAIN, NO_DOMAIN, SHUFFLED_PROMPTS = "wrong_domain", "no_domain", "shuffled_prompts"


def corrupt_prompts(examples: Sequence[Example], domain_in_prompt: bool, seed: int) -> dict[str, dict[int, Example]]:
    """The changed rows of every control that makes sense, by the place of the row that each was.

    Args:
        domain_in_prompt: whether prompts say the domain. The controls of domains take the rows that have one, and need
            two different ones.
    """
    changed: dict[str, dict[int, Example]] = {}
    told = {i: e for i, e in enumerate(examples) if e.domain is not None}
    if domain_in_prompt and len({e.domain for e in told.values()}) > 1:
        wrong = wrong_domains(list(told.values()))
        changed[WRONG_DOMAIN] = {i: replace(told[i], domain=d) for i, d in zip(told, wrong, strict=True)}
        changed[NO_DOMAIN] = {i: replace(e, domain=None) for i, e in told.items()}
    asking = {i: e for i, e in enumerate(examples) if not e.is_text}
    if len(asking) > 1:
        shuffled = zip(asking, shuffled_prompts(list(asking.values()), seed), strict=True)
        changed[SHUFFLED_PROMPTS] = {i: e for i, e in shuffled if e != asking[i]}  # the same prompt tells nothing
    return {name: rows for name, rows in changed.items() if rows}


def wrong_domains(examples: Sequence[Example]) -> list[str]:
    """For each row another domain than its own: the next one in the order of names. All have one, of two or more."""
    names = sorted({str(e.domain) for e in examples})
    return [names[(names.index(str(e.domain)) + 1) % len(names)] for e in examples]


def shuffled_prompts(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each row with what the user says in another row, at random: no row keeps its own place.

    What else a row says stays: its answers, earlier ones too, calls of tools and their results, the system's message.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one cycle through all of them
    return [_replace_prompts(e, examples[other[i]]) for i, e in enumerate(examples)]


def _replace_prompts(example: Example, other: Example) -> Example:
    """The example with the user's turns of another, taken in turn as often as it has turns."""
    asked = [m for m in other.messages if m.role == "user"]
    if not asked:
        return example
    turns = cycle(asked)
    messages: tuple[Message, ...] = tuple(next(turns) if m.role == "user" else m for m in example.messages)
    return replace(example, messages=messages)
