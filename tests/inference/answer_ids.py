"""The tokens of many answers, as several tests compare them."""

from __future__ import annotations

from typing import Any

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.generator import generate_answers
from training_lens.inference.session import Session


def answer_ids(session: Session, prompts: Any, settings: InferenceSection, **options: Any) -> list[list[int]]:
    """Arguments are those of `generate_answers`."""
    return [list(answer.token_ids) for answer in generate_answers(session, prompts, settings, **options)]
