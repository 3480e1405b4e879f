"""Changed prompts over the same answers: what an adapter loses on them shows what of the prompt it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from training_lens.data.types import Example, Message

WRONG_DOMAIN, NO_DOMAIN, SHUFFLED_PROMPTS = "wrong_domain", "no_domain", "shuffled_prompts"


def controls_of(examples: Sequence[Example], domain_in_prompt: bool, seed: int) -> dict[str, list[Example]]:
    """The rows of every control that makes sense for them, in the rows' order.

    Args:
        domain_in_prompt: whether prompts say the domain; the controls of domains also need two of them.
    """
    changed: dict[str, list[Example]] = {}
    if domain_in_prompt and len({e.domain for e in examples}) > 1:
        told = wrong_domains(examples)
        changed[WRONG_DOMAIN] = [replace(e, domain=d) for e, d in zip(examples, told, strict=True)]
        changed[NO_DOMAIN] = [replace(e, domain=None) for e in examples]
    if sum(not e.is_text for e in examples) > 1:
        changed[SHUFFLED_PROMPTS] = shuffled_prompts(examples, seed)
    return changed


def wrong_domains(examples: Sequence[Example]) -> list[str]:
    """For each row another domain than its own: the next one in the order of names. Needs two domains or more."""
    names = sorted({e.domain for e in examples if e.domain is not None})
    return [names[(names.index(e.domain) + 1) % len(names)] if e.domain else "" for e in examples]


def shuffled_prompts(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each row with what the user says in another row, at random: no row keeps its own place. Answers stay.

    Plain texts have no prompt and stay as they are.
    """
    asking = [i for i, e in enumerate(examples) if not e.is_text]
    order = np.random.default_rng(seed).permutation(asking)
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one cycle through all of them
    return [_asked_as(e, examples[other[i]]) if i in other else e for i, e in enumerate(examples)]


def _asked_as(example: Example, other: Example) -> Example:
    """The example with the user's turns of another, taken in turn as often as it has turns."""
    asked = [m for m in other.messages if m.role == "user"]
    if not asked:
        return example
    turns = cycle(asked)
    messages: tuple[Message, ...] = tuple(next(turns) if m.role == "user" else m for m in example.messages)
    return replace(example, messages=messages)
