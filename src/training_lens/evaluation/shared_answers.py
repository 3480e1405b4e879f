"""Answers to many prompts, shared out over the processes that evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.batching import shard_positions
from training_lens.inference.generator import GeneratedAnswer, generate_answers
from training_lens.inference.session import Session
from training_lens.utils.processes import Processes


def generate_shared_answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    settings: InferenceSection,
    processes: Processes,
    *,
    base: bool = False,
    advance: Callable[[float], None] = lambda _done: None,
) -> list[GeneratedAnswer]:
    """Greedy answers to all prompts, in their order, on every process; each process gives those to its share.

    Prompts are shared by tokens, as rows of a step are. Errors and arguments are those of `generate_answers`. A sync
    point if there are several processes.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    shares = [shard_positions(np.arange(len(prompts)), lengths, i, processes.count) for i in range(processes.count)]
    own = [prompts[place] for place in shares[processes.index].tolist()]
    part = len(prompts) / max(1, len(own))

    def advance_all(done: float) -> None:
        advance(done * part)

    found = processes.gather(generate_answers(session, own, settings, base=base, advance=advance_all))
    answers = {
        place: answer
        for share, given in zip(shares, found, strict=True)
        for place, answer in zip(share.tolist(), given, strict=True)
    }
    return [answers[place] for place in range(len(prompts))]
