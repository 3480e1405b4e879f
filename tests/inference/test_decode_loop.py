"""However prompts are put together, each is answered as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answer_ids import answer_ids
from slow_cases import slow_but

from training_lens import TrainingConfig
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.errors import ConfigurationError
from training_lens.inference.decode_loop import MIN_SHARED_TOKENS, Decoder
from training_lens.inference.session import Session, open_session

NEW = 10


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(TrainingConfig.model_validate({"inference": {"adapter": "none"}}))


def random_prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(20, 600, (length,), generator=generator).tolist() for length in lengths]


def alone(session: Session, prompts: list[list[int]]) -> list[list[int]]:
    return [answer_ids(session, [prompt], InferenceSection(max_new_tokens=NEW))[0] for prompt in prompts]


def rows_of(count: int, longest: int) -> InferenceSection:
    return InferenceSection(max_new_tokens=NEW, batch_tokens=count * (longest + NEW))


@pytest.fixture
def read_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the model, how many tokens it was given."""
    logits, seen = Decoder.compute_logits, list[int]()

    def noted(decoder: Decoder, ids: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(ids.numel())
        return logits(decoder, ids, *given)

    monkeypatch.setattr(Decoder, "compute_logits", noted)
    return seen


@pytest.mark.parametrize("rows", slow_but([3], [2, 3]))
def test_finished_rows_make_room(session: Session, rows: int, read_tokens: list[int]) -> None:
    prompts = random_prompts(30, 40)
    wanted = alone(session, prompts)
    read_tokens.clear()
    assert answer_ids(session, prompts, rows_of(rows, 40)) == wanted
    assert len(read_tokens) < len(prompts) * NEW / 2


def test_places_without_answer_are_given_up(session: Session, read_tokens: list[int]) -> None:
    prompts = random_prompts(16, 40)
    settings = InferenceSection(max_new_tokens=60, drafts="off")
    wanted = [answer_ids(session, [prompt], settings)[0] for prompt in prompts]
    read_tokens.clear()
    assert answer_ids(session, prompts, settings) == wanted
    steps = read_tokens[2:]  # after the prompts, in two lots
    assert steps == sorted(steps, reverse=True) and steps[-1] < 16


def test_a_beginning_that_all_share_is_read_once(session: Session, read_tokens: list[int]) -> None:
    shared = random_prompts(1, 200)[0] * 3
    assert len(shared) > MIN_SHARED_TOKENS
    prompts = [shared + rest for rest in random_prompts(6, 9)] + [shared[:-1]]
    wanted = alone(session, prompts)
    read_tokens.clear()
    assert answer_ids(session, prompts, InferenceSection(max_new_tokens=NEW)) == wanted
    assert sum(read_tokens[:2]) < 2 * len(shared) + sum(map(len, prompts)) - 6 * len(shared)


def test_one_long_prompt_does_not_keep_short_ones_apart(session: Session, read_tokens: list[int]) -> None:
    prompts = [*random_prompts(12, 20), random_prompts(1, 2)[0] * 400]
    wanted = alone(session, prompts)
    read_tokens.clear()
    assert answer_ids(session, prompts, InferenceSection(max_new_tokens=NEW, batch_tokens=410)) == wanted
    assert 12 in read_tokens


def test_a_prompt_without_room_to_answer_is_refused(session: Session) -> None:
    with pytest.raises(ConfigurationError, match="a prompt has 512 tokens, the model 512 positions: no room to answer"):
        answer_ids(session, [[20], [20] * 512], InferenceSection())


def test_no_prompts_have_no_answers(session: Session) -> None:
    assert answer_ids(session, [], InferenceSection()) == []
