"""A long-rope model's answers are those of transformers, where it changes to its long factors and where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from answer_ids import answer_ids
from tiny_models import WANDERING, save_tiny_model

from training_lens.config.compose import validate_values
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.inference.generator import answer
from training_lens.inference.session import Session, open_session

LIMIT, NEW = 24, 12
LENGTHS = [5, 9, LIMIT - NEW, LIMIT - NEW + 1, 18, LIMIT - 1, LIMIT, LIMIT + 1, 40]
PROMPTS = [[(7 * length + 3 * i) % 600 + 20 for i in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Phi-3 of random weights with the embedded tokenizer."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 5.0, 20.0]}
    sizes = WANDERING | {"vocab_size": 660, "bos_token_id": None, "eos_token_id": 5, "initializer_range": 0.5}
    places = {"max_position_embeddings": 96, "original_max_position_embeddings": LIMIT}
    sizes |= {**places, "rope_parameters": {"rope_theta": 1e4, **rope, "original_max_position_embeddings": LIMIT}}
    return save_tiny_model(tmp_path_factory.mktemp("phi3"), "Phi3", **sizes)


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(
        validate_values(
            {"model": {"id": str(folder), "dtype": "fp32", "device": "cpu"}, "inference": {"adapter": "none"}}
        )
    )


def by_transformers(folder: Path, session: Session, prompt: list[int], **options: Any) -> list[int]:
    """The greedy answer of a model that was loaded for this prompt alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ends = {"eos_token_id": sorted(session.stop_ids), "pad_token_id": session.pad_id}
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **ends, **options)
    return [token for token in out[0, len(prompt) :].tolist() if token not in session.stop_ids]


def test_answers_are_those_of_transformers_with_and_without_a_cache(folder: Path, session: Session) -> None:
    settings = InferenceSection(max_new_tokens=NEW, temperature=0.0)
    together = answer_ids(session, PROMPTS, settings, base=True)
    wanted = [by_transformers(folder, session, prompt) for prompt in PROMPTS]
    assert together == wanted and len({tuple(row) for row in wanted}) > 5
    assert wanted == [by_transformers(folder, session, prompt, use_cache=False) for prompt in PROMPTS]
    assert (
        answer_ids(session, PROMPTS[:3], settings, base=True) == wanted[:3]
    )  # behind long ones, the short factors again
    streamed = answer(session, PROMPTS[5], settings, base=True, on_text=lambda _text: None)
    assert streamed == session.tokenizer.decode(wanted[5], skip_special_tokens=True)


def test_short_prompts_are_decoded_together_and_the_others_alone(session: Session) -> None:
    from training_lens.inference.fallback_generate import needs_long_factors

    assert [needs_long_factors(session, length + NEW) for length in LENGTHS] == [False] * 3 + [True] * 6
    assert session.decoders.get_decoder(session.model, True, PROMPTS[0]) is not None
