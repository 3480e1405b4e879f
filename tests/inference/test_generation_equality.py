"""Greedy answers from padded batches are token for token those of `model.generate` for each prompt alone.

The models are tiny and random, so that their answers wander through the vocabulary; the trained run is there besides.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_ids import answer_ids
from slow_cases import mark_slow, slow_but
from tiny_models import WANDERING, save_tiny_model

from training_lens import TrainingConfig
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.schema import ModelSection, PeftSection
from training_lens.data.examples import Message
from training_lens.errors import OutOfMemoryError
from training_lens.inference.decode_loop import Decoder
from training_lens.inference.session import Session, open_run, open_session
from training_lens.models.adapters import attach, base_only, save_adapter, trainable_parameters
from training_lens.models.copies import copy_merged
from training_lens.models.factory import load_model
from training_lens.runs.run_folder import RunFolder

POSITIONS, NEW = 64, 10
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 11, 13, 16, 20, 25, 30, 35, 40, 50, 57, 60]  # the last two leave 7 and 4 positions
NEVER = 999  # a stop token beyond the vocabulary
TIE = 4  # units in the last place of bf16: no two logits nearer to each other can be told apart
SIZES = WANDERING | {
    "vocab_size": 660,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.5,
    "eos_token_id": 5,
    "bos_token_id": None,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = SIZES | WINDOWED | {"query_pre_attn_scalar": 8, "tie_word_embeddings": False}  # tied, it says one token on
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "mistral, sliding window": ("Mistral", SIZES | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3, sliding window": ("Qwen3", SIZES | WINDOWED | {"use_sliding_window": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA),
    "olmo2": ("Olmo2", SIZES),
    "cohere": ("Cohere", SIZES | {"use_qk_norm": True, "logit_scale": 0.5}),
    "gpt2, absolute positions": (
        "GPT2",
        {"vocab_size": 660, "n_positions": POSITIONS, "initializer_range": 0.5, "eos_token_id": 5},
    ),
}
QUICK = ["llama", "gemma3", "gpt2, absolute positions"]
STOPPED = list(zip(MODELS, cycle((3, 16))))
Ids = list[list[int]]


@dataclass(frozen=True)
class Subject:
    """A model of `MODELS` with its adapter, and what `generate` says to each prompt alone, without an early stop."""

    folder: Path
    session: Session
    wanted: dict[bool, Ids]  # of the base (True) and of the adapter


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Gives the subject of a name, which is made once."""

    @cache
    def make(name: str) -> Subject:
        folder = random_model(tmp_path_factory.mktemp("model"), name)
        session, said = opened(folder), {}
        for base in (False, True):
            with base_only(session.model, base):
                said[base] = [alone(session, prompt) for prompt in PROMPTS]
        return Subject(folder, session, said)

    return make


def random_model(path: Path, name: str) -> Path:
    """A random model saved with the embedded tokenizer, and a random adapter of it in `adapter`."""
    kind, sizes = MODELS[name]
    save_tiny_model(path, kind, **sizes)
    adapted = attach(load_model(ModelSection(id=str(path)), torch.device("cpu"), "fp32"), PeftSection(r=4))
    for _, parameter in trainable_parameters(adapted):
        parameter.data += 0.1 * torch.randn_like(parameter)
    (path / "adapter").mkdir()
    save_adapter(adapted, path / "adapter")
    return path


def opened(folder: Path, precision: str = "fp32") -> Session:
    """The adapter on its model; no answer stops early."""
    model, inference = {"id": str(folder)}, {"adapter": str(folder / "adapter")}
    values = {"model": model, "inference": inference, "training": {"precision": precision}}
    return replace(open_session(TrainingConfig.model_validate(values)), stop_ids=frozenset({NEVER}))


def random_prompts() -> Ids:
    """Random tokens of all lengths, shuffled; no special ones."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(LENGTHS), generator=generator).tolist()
    return [torch.randint(20, 660, (LENGTHS[i],), generator=generator).tolist() for i in order]


PROMPTS = random_prompts()
Prepare = Callable[[str], Subject]


def settings(rows: int, longest: int = POSITIONS - NEW) -> InferenceSection:
    """A budget for so many rows of the longest prompt, and so for more of shorter ones."""
    return InferenceSection(max_new_tokens=NEW, batch_tokens=rows * (longest + NEW))


def generated(session: Session, prompt: Sequence[int], new: int = NEW) -> Any:
    """The model's own greedy `generate` for one prompt, unpadded; `sequences` without the prompt, and `logits`."""
    ids = torch.tensor([prompt])
    out = session.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=min(new, (session.positions or 10**6) - len(prompt)),
        eos_token_id=sorted(session.stop_ids),
        pad_token_id=session.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), out.logits


def alone(session: Session, prompt: Sequence[int]) -> list[int]:
    """The tokens of `generated` up to the first that stops."""
    said: list[int] = generated(session, prompt)[0]
    return said[:-1] if said[-1] in session.stop_ids else said


@pytest.mark.parametrize(
    ("name", "rows"),
    slow_but(
        [("llama", 3), ("gemma3", 16), ("gpt2, absolute positions", 1)],
        [*product(MODELS, (3, 16)), ("llama", 1), ("gpt2, absolute positions", 1)],
    ),
)
def test_batches_say_what_generate_says_to_each_prompt(
    prepare: Prepare, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, wanted = prepare(name).session, prepare(name).wanted
    done: list[float] = []
    seen = limit_rows(16, monkeypatch)
    for base in (False, True):
        assert answer_ids(session, PROMPTS, settings(rows), base=base, advance=done.append) == wanted[base]
    assert rows in seen and sum(done) == 2 * len(PROMPTS)
    assert wanted[True] != wanted[False]


@pytest.mark.parametrize("name", slow_but(QUICK, MODELS))
def test_merged_says_what_the_adapter_says(prepare: Prepare, name: str) -> None:
    session, wanted = prepare(name).session, prepare(name).wanted
    merged = replace(session, model=copy_merged(session.model))
    assert answer_ids(merged, PROMPTS, settings(16)) == wanted[False]


@pytest.mark.parametrize(("name", "rows"), [mark_slow(case) if case[0] not in QUICK else case for case in STOPPED])
def test_rows_stop_each_at_its_own_step(prepare: Prepare, name: str, rows: int) -> None:
    session, wanted = prepare(name).session, prepare(name).wanted
    stops = frozenset(row[i % len(row)] for i, row in enumerate(wanted[False]) if i % 3 == 0)
    ends = [next((i for i, token in enumerate(row) if token in stops), len(row)) for row in wanted[False]]
    said = answer_ids(replace(session, stop_ids=stops), PROMPTS, settings(rows))
    assert said == [row[:end] for row, end in zip(wanted[False], ends, strict=True)]
    assert len(set(ends)) > 4


@pytest.mark.parametrize("name", slow_but(["llama"], MODELS))
def test_in_bf16_answers_differ_at_ties_alone(
    prepare: Prepare, name: str, record_property: pytest.RecordProperty
) -> None:
    """The first token that differs has, in the model's own words, a logit as high as rounding can tell."""
    session = opened(prepare(name).folder, "bf16")
    ties = 0
    for prompt, said in zip(PROMPTS, answer_ids(session, PROMPTS, settings(16)), strict=True):
        expected, logits = generated(session, prompt)
        if said != expected:
            step = next(i for i, (a, b) in enumerate(zip(said, expected, strict=True)) if a != b)
            assert in_last_places(logits[step][0], expected[step], said[step]) <= TIE
            ties += 1
    record_property("ties", ties)
    print(f"{ties} of {len(PROMPTS)} answers differ, each at a tie")
    assert ties < len(PROMPTS) / 2


def in_last_places(logits: torch.Tensor, chosen: int, other: int) -> float:
    """How far the other token's logit lies below the chosen one's, in bf16's units in the last place there."""
    highest = float(logits[chosen])
    assert highest == float(logits.max())
    return (highest - float(logits[other])) / 2.0 ** (math.floor(math.log2(abs(highest))) - 7)


@pytest.fixture(scope="module")
def trained(embedded_run: RunFolder) -> Session:
    return open_run(embedded_run)


@pytest.mark.parametrize("who", slow_but(["adapter"], ["base", "adapter", "merged"]))
def test_a_trained_run_says_what_generate_says(trained: Session, who: str) -> None:
    """Real prompts, the run's own end tokens: rows stop early, each at its own step."""
    asked = [f"What is {i} plus {i % 4}?" + " Mia gave Tom 2 red apples." * (i % 5) for i in range(16)]
    prompts = [trained.prompt_ids([Message("user", text)], trained.domains[i % 3]) for i, text in enumerate(asked)]
    session = replace(trained, model=copy_merged(trained.model)) if who == "merged" else trained
    with base_only(session.model, who == "base"):
        wanted = [alone(session, prompt) for prompt in prompts]
    assert len({len(row) for row in wanted}) > 2
    for rows in (1, 3, 16):
        said = answer_ids(session, prompts, settings(rows, max(map(len, prompts))), base=who == "base")
        assert said == wanted


@pytest.mark.parametrize(
    "asked",
    slow_but(
        [{"no_repeat_ngram_size": 1}], [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"min_length": 11}]
    ),
    ids=str,
)
def test_what_a_generation_config_asks_does_not_see_the_padding(tmp_path: Path, asked: dict[str, Any]) -> None:
    """The padding's token is made one that the model likes to say, so that it shows where padding counts as text."""
    session = opened(random_model(tmp_path, "llama"))
    often, _ = Counter(token for prompt in PROMPTS for token in alone(session, prompt)).most_common(1)[0]
    head = session.model.get_output_embeddings().weight
    head[session.pad_id] = 1.05 * head[often]
    plain = [alone(session, prompt) for prompt in PROMPTS]
    assert any(session.pad_id in row for row in plain)
    session = replace(session, stop_ids=frozenset(row[3] for row in plain[:8]))
    session.model.generation_config.update(**asked)
    wanted = [alone(session, prompt) for prompt in PROMPTS]
    assert answer_ids(session, PROMPTS, settings(16)) == wanted != plain


def limit_rows(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The decoder as on a device with memory for `most` rows; the rows that it is given are noted."""
    logits, seen = Decoder.compute_logits, list[int]()

    def logits_or_run_out(decoder: Decoder, ids: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(decoder, ids, *given)

    monkeypatch.setattr(Decoder, "compute_logits", logits_or_run_out)
    return seen


def test_out_of_memory_halves_the_batch_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = opened(random_model(tmp_path, "llama"))
    prompts = [prompt for prompt in PROMPTS if 20 <= len(prompt) <= 40] * 2
    wanted = answer_ids(session, prompts, settings(1))
    seen = limit_rows(3, monkeypatch)
    done: list[float] = []
    with caplog.at_level(logging.WARNING, "training_lens"):
        assert answer_ids(session, prompts, settings(16), advance=done.append) == wanted
    assert seen[:3] == [10, 5, 2] and max(seen[2:]) <= 3 and sum(done) == len(prompts)
    assert [r.getMessage() for r in caplog.records] == [
        "memory ran out with 10 prompts together, so fewer: CUDA out of memory. Tried to allocate 2.00 GiB."
    ]


def test_one_row_that_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(random_model(tmp_path, "llama"))
    prompts = [p for p in PROMPTS if 20 <= len(p) <= 40]
    answer_ids(session, prompts, settings(16))  # the decoder is made before memory is short
    seen = limit_rows(0, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"one prompt with its answer \(50 tokens\): CUDA out of memory"):
        answer_ids(session, prompts, settings(16))
    assert seen == [5, 2, 1]
