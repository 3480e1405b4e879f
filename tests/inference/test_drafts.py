"""Speculative decoding: drafts come from a row's own text, and answers are those of one token a step, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_ids import answer_ids
from slow_cases import slow_but
from test_shared_decoder import adapt, share
from tiny_models import WANDERING, tiny_model

from training_lens import TrainingConfig
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import Message
from training_lens.inference.decode_loop import MOST_DRAFTING_ROWS, DecodeBatch, DecodeLoop, Decoder
from training_lens.inference.decoder import build_decoder
from training_lens.inference.drafts import LENGTHS, MOST_REFUSED, PAUSES, NgramDrafts
from training_lens.inference.row_sampler import RowSampler, SampledCompletion
from training_lens.inference.sampler import Completion, Sampler, generation_options
from training_lens.inference.session import Session, open_session
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.kv_cache import SlotCache
from training_lens.models.fast.native import library
from training_lens.models.fast.native.decoding_kernels import FewRowsLinear
from training_lens.models.fast.row_adapters import AdapterOfRow

WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Answers that wander and come to repeat themselves, each at another place.
SMALL = WANDERING | {"initializer_range": 0.1, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "gemma3, sliding window": (
        "Gemma3Text",
        SMALL | WINDOWED | {"pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False},
    ),
    "mistral, sliding window": ("Mistral", SMALL | {"sliding_window": 8}),
    "cohere": ("Cohere", SMALL | {"logit_scale": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2, which takes none": ("GPT2", {"vocab_size": 64, "n_positions": 256, "initializer_range": 0.3}),
}
NEW, ROWS = 60, 4


def draw_prompts(count: int) -> list[list[int]]:
    """Of phrases that come several times; the first 20 tokens are shared by all."""
    generator = torch.Generator().manual_seed(0)
    phrases = torch.randint(3, 60, (6, 9), generator=generator).tolist()
    starts = torch.randint(0, 6, (count, 5), generator=generator).tolist()
    beginning = phrases[0] + phrases[1] + [7, 8]
    rests = [[token for i in row for token in phrases[i]] for row in starts]
    return [beginning + rest[: 20 + 7 * n] for n, rest in enumerate(rests)]


def decode(
    decoder: Decoder, prompts: list[list[int]], drafts: str, stops: frozenset[int] = frozenset(), rows: int = ROWS
) -> list[SampledCompletion]:
    """The completions of the prompts, with log-probabilities, by continuous batching."""
    settings = InferenceSection(drafts=drafts)
    sampler = Sampler(decoder.model, generation_options(settings, stops, 0), decoder.device)
    completions = [
        SampledCompletion(
            prompt, NEW - n, stops, sampler=sampler, top_logprobs=2, drafts=sampler.start_drafts(settings)
        )
        for n, prompt in enumerate(prompts)
    ]
    waiting = sorted(completions, key=lambda c: -len(c.prompt))
    while waiting:
        done = [row for finished in DecodeLoop(decoder, RowSampler(), waiting, rows).run() for row in finished]
        waiting = [row for row in waiting if row not in done]
    return completions


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each step, how many tokens it has for each slot."""
    opens, seen = SlotCache.open_tokens, list[list[int]]()

    def note(cache: SlotCache, counts: list[int]) -> torch.Tensor:
        seen.append(list(counts))
        return opens(cache, counts)

    monkeypatch.setattr(SlotCache, "open_tokens", note)
    return seen


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", slow_but(["llama", "gemma3, sliding window", "gpt2, which takes none"], KINDS))
@torch.inference_mode()
def test_answers_with_drafts_are_those_without(name: str, steps: list[list[int]]) -> None:
    """Rows that accept different numbers of tokens, stop inside a draft, make room for others, and end at a length."""
    kind, sizes = KINDS[name]
    decoder = build_decoder(tiny_model(kind, **sizes), False, torch.arange(24)[None])
    prompts = draw_prompts(9)
    plain = decode(decoder, prompts, "off")
    rows_with = Counter(token for row in plain for token in set(row.tokens))
    stops = frozenset({rows_with.most_common()[-1][0]})
    wanted = decode(decoder, prompts, "off", stops)
    assert {row.has_stopped for row in wanted} == {True, False}
    steps.clear()
    found = decode(decoder, prompts, "auto", stops)
    assert [row.tokens for row in found] == [row.tokens for row in wanted]
    assert [row.has_stopped for row in found] == [row.has_stopped for row in wanted]
    for row, one_by_one in zip(found, wanted, strict=True):
        assert [entry.token for entry in row.logprobs] == [entry.token for entry in one_by_one.logprobs]
        assert [e.logprob for e in row.logprobs] == pytest.approx([e.logprob for e in one_by_one.logprobs], abs=1e-4)
    most = max(max(counts) for counts in steps)
    if decoder.stack is None:
        assert most == 1
        return
    lengths = {len(set(counts)) for counts in steps}
    assert most > 4 and len(lengths) > 1, "rows of a step had drafts of different lengths"


class ToldSampler:
    """Chooses the tokens that it was told."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def sample_next_token(self, logits: torch.Tensor, rows: Sequence[Completion | None]) -> torch.Tensor:
        (row,) = set(rows)
        assert row is not None
        return torch.tensor(self.answer[len(row.tokens) :][: len(rows)])


@pytest.mark.parametrize("stop", [4, 8, 9, 19, 20, None])
@torch.inference_mode()
def test_a_stop_token_inside_a_draft_ends_the_answer_there(stop: int | None, steps: list[list[int]]) -> None:
    decoder = build_decoder(tiny_model("Llama", **SMALL), False, torch.arange(24)[None])
    prompt = [*range(10, 40), 3, 4]
    stops, told, seen = frozenset({prompt[stop]} if stop else {}), prompt[:22], list[int]()
    row = Completion(prompt, 20, stops, seen.append, drafts=NgramDrafts())
    steps.clear()
    assert [*DecodeLoop(decoder, ToldSampler(told), [row], 1).run()] == [[row]]
    assert row.tokens == seen == told[: 20 if stop is None else min(stop, 20)]
    assert row.has_stopped == (stop is not None and stop < 20)
    full = [1, 4, 8, 6]  # of 20 tokens: the first by the prefill, and of a draft as many as are left
    assert steps == [[count] for count in full[: len(steps)]] and sum(full[: len(steps) - 1]) < len(seen)


@pytest.mark.skipif(
    not library.has_kernel("few_rows", torch.bfloat16), reason="this processor multiplies no pairs of bfloat16"
)
@pytest.mark.parametrize("is_adapted", [False, True])
@torch.inference_mode()
def test_in_bf16_drafts_change_no_bit(is_adapted: bool, steps: list[list[int]]) -> None:
    """Where few rows have a kernel of their own, which all products of a step with drafts go through.

    No row waits: which prompts are prefilled together, and so how they are rounded, may depend on when others end.
    """
    base = tiny_model("Llama", torch.bfloat16, **SMALL)
    decoder = build_decoder(adapt(base, "lora") if is_adapted else base, False, torch.arange(24)[None])
    linears = [part for part in decoder.model.modules() if isinstance(part, FusedLinear)]
    assert all(part.few for part in linears) and any(part.has_adapter for part in linears) == is_adapted
    prompts = draw_prompts(ROWS)
    wanted = decode(decoder, prompts, "off")
    steps.clear()
    found = decode(decoder, prompts, "auto")
    assert max(map(max, steps)) > 1
    assert [row.tokens for row in found] == [row.tokens for row in wanted]
    assert [row.logprobs for row in found] == [row.logprobs for row in wanted]


@pytest.fixture(scope="module")
def embedded() -> Session:
    return open_session(TrainingConfig.model_validate({"inference": {"adapter": "none"}}))


def ask(session: Session) -> list[list[int]]:
    """Real prompts, some of which the model repeats."""
    texts = ["Mia had 9 blue plates. " * n + "Mia gave Hugo 2 of them. Note who has what." for n in (1, 3, 5)]
    return [session.prompt_ids([Message("user", text)], None) for text in [*texts, "Where does the owl live?"]]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_trained_model_says_the_same(embedded: Session, rows: int, steps: list[list[int]]) -> None:
    session, prompts = replace(embedded, stop_ids=frozenset()), ask(embedded)
    settings = InferenceSection(max_new_tokens=100, batch_tokens=rows * (max(map(len, prompts)) + 100))
    wanted = answer_ids(session, prompts, settings.model_copy(update={"drafts": "off"}))
    alone = len(steps)
    assert answer_ids(session, prompts, settings) == wanted
    assert len(steps) - alone < 0.95 * alone


def test_stories_are_the_same(shared: Path) -> None:
    model = shared / "models" / "tinystories-656k"
    if not model.exists():
        pytest.skip(f"no model at {model}")
    for precision in ("fp32", "bf16"):
        values = {"model": {"id": str(model)}, "inference": {"adapter": "none"}, "training": {"precision": precision}}
        session = open_session(TrainingConfig.model_validate(values))
        starts = ["Once upon a time, there was a dog.", "Lily and Ben went to the park. Lily and Ben", "The sun"]
        prompts = [session.tokenizer(text).input_ids for text in starts]
        settings = InferenceSection(max_new_tokens=150)
        wanted = answer_ids(session, prompts, settings.model_copy(update={"drafts": "off"}))
        assert answer_ids(session, prompts, settings) == wanted


@torch.inference_mode()
def test_each_draft_is_computed_with_its_rows_adapter(steps: list[list[int]]) -> None:
    base, decoder = share("Llama")
    sampler = Sampler(base, generation_options(InferenceSection(), frozenset(), 0), base.device)
    choices = [None, AdapterOfRow("lora"), AdapterOfRow("dora", 0.5), AdapterOfRow("rslora")]

    def answer(drafts: bool) -> list[list[int]]:
        prompts = [[*range(10 + n, 30), 10 + n, 11 + n] for n in range(4)]
        rows = [
            SampledCompletion(
                prompt, 40, frozenset(), sampler=sampler, adapter=adapter, drafts=NgramDrafts() if drafts else None
            )
            for prompt, adapter in zip(prompts, choices, strict=True)
        ]
        batch = DecodeBatch(decoder, RowSampler(), len(rows), 64)
        batch.prefill_rows(rows)
        while batch.completions:
            batch.step()
        return [row.tokens for row in rows]

    wanted = answer(drafts=False)
    steps.clear()
    assert answer(drafts=True) == wanted
    assert any(len(counts) == 4 and max(counts) > 1 for counts in steps)


@torch.inference_mode()
def test_many_rows_take_no_drafts_and_drawn_ones_never(steps: list[list[int]]) -> None:
    model = tiny_model("Llama", **SMALL)
    decoder = build_decoder(model, False, torch.arange(24)[None])
    decode(decoder, draw_prompts(8), "auto", rows=8)
    assert all(max(counts) == 1 for counts in steps if len(counts) > MOST_DRAFTING_ROWS)
    assert max(max(counts) for counts in steps) > 1, "the last rows do"
    assert MOST_DRAFTING_ROWS * (1 + LENGTHS[-1]) <= FewRowsLinear.MOST
    for settings in (InferenceSection(temperature=0.5), InferenceSection(drafts="off")):
        assert Sampler(model, generation_options(settings, frozenset(), 0), model.device).start_drafts(settings) is None
    model.generation_config.repetition_penalty = 1.2  # which counts the tokens so far
    greedy = InferenceSection()
    assert Sampler(model, generation_options(greedy, frozenset(), 0), model.device).start_drafts(greedy) is None


def test_a_draft_is_what_followed_the_last_tokens_before() -> None:
    drafts = NgramDrafts()
    assert drafts.propose([1, 2, 3, 4, 5, 9, 2, 3, 8], [1, 2, 3], 3) == [4, 5, 9], "three tokens go before two"
    assert drafts.propose([1, 2, 3, 4, 5, 9, 2, 3, 8], [1, 2, 3, 7, 2, 3], 9) == [7, 2, 3], "of the last occurrence"
    assert NgramDrafts().propose([5, 6, 5, 6], [], 3) == [5, 6, 5], "a loop goes on"
    assert NgramDrafts().propose([1, 2, 3], [4], 3) == []
    assert NgramDrafts().propose([], [1], 3) == []


def test_drafts_grow_while_they_are_right_and_pause_while_they_are_wrong() -> None:
    right, prompt, answer = NgramDrafts(), list(range(50)), [0, 1]
    lengths = []
    while len(answer) < 50:
        draft = right.propose(prompt, answer, 50 - len(answer))
        right.note_accepted(len(draft), len(draft))
        lengths.append(len(draft))
        answer += [*draft, answer[-1] + len(draft) + 1]
    assert lengths[:3] == list(LENGTHS[1:])

    wrong, answer, drafted = NgramDrafts(), list[int](), list[int]()
    for i in range(1000):  # always the same tokens with other ones after them
        answer += [100 + i, 1, 2]
        draft = wrong.propose([1, 2, 3], answer, 50)
        if draft:
            wrong.note_accepted(len(draft), 0)
            drafted.append(len(draft))
    assert MOST_REFUSED < len(drafted) <= MOST_REFUSED + len(PAUSES) + len(answer) / PAUSES[-1]
    assert sum(drafted) < 0.01 * len(answer)
