"""Controls: corrupted prompts over the same answers. What the adapter loses shows how much it uses the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from training_lens.data.examples import Example, Message

WRONG_DOMAIN, NO_DOMAIN, SHUFFLED_PROMPTS = "wrong_domain", "no_domain", "shuffled_prompts"


def corrupt_prompts(examples: Sequence[Example], domain_in_prompt: bool, seed: int) -> dict[str, dict[int, Example]]:
    """The corrupted rows of each control, by the index of the original row.

    Args:
        domain_in_prompt: whether prompts name the domain. The domain controls take the rows that have a domain, and
            need two different ones.
    """
    changed: dict[str, dict[int, Example]] = {}
    with_domain = {i: e for i, e in enumerate(examples) if e.domain is not None}
    if domain_in_prompt and len({e.domain for e in with_domain.values()}) > 1:
        wrong = wrong_domains(list(with_domain.values()))
        changed[WRONG_DOMAIN] = {i: replace(with_domain[i], domain=d) for i, d in zip(with_domain, wrong, strict=True)}
        changed[NO_DOMAIN] = {i: replace(e, domain=None) for i, e in with_domain.items()}
    prompted = {i: e for i, e in enumerate(examples) if not e.is_text}
    if len(prompted) > 1:
        shuffled = zip(prompted, shuffled_prompts(list(prompted.values()), seed), strict=True)
        changed[SHUFFLED_PROMPTS] = {i: e for i, e in shuffled if e != prompted[i]}  # an unchanged prompt is no control
    return {name: rows for name, rows in changed.items() if rows}


def wrong_domains(examples: Sequence[Example]) -> list[str]:
    """For each row the next domain in the order of names; every row has a domain, and there are at least two."""
    names = sorted({str(e.domain) for e in examples})
    return [names[(names.index(str(e.domain)) + 1) % len(names)] for e in examples]


def shuffled_prompts(examples: Sequence[Example], seed: int) -> list[Example]:
    """Each row with the user messages of another row, drawn at random; no row keeps its own.

    The other messages stay: answers, tool calls and their results, the system message.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one cycle through all of them
    return [_replace_prompts(e, examples[other[i]]) for i, e in enumerate(examples)]


def _replace_prompts(example: Example, other: Example) -> Example:
    """The example with the user messages of another, repeated as often as needed."""
    asked = [m for m in other.messages if m.role == "user"]
    if not asked:
        return example
    turns = cycle(asked)
    messages: tuple[Message, ...] = tuple(next(turns) if m.role == "user" else m for m in example.messages)
    return replace(example, messages=messages)
