"""Rows of several adapters on one decoder, which join and leave at any step: each answers as its model does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import WANDERING, tiny_model

from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.schema import PeftSection
from training_lens.inference.decode_loop import DecodeBatch, Decoder
from training_lens.inference.row_sampler import RowSampler, SampledCompletion
from training_lens.inference.sampler import Sampler, generation_options
from training_lens.inference.shared_decoder import AdapterProbe, build_shared_decoder, probe_adapter
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.copies import copy_base
from training_lens.models.fast.layer_spec import UnknownLayerError
from training_lens.models.fast.row_adapters import AdapterOfRow

PROBE = list(range(3, 23))
NEW = 9
KINDS: dict[str, dict[str, Any]] = {
    "Llama": WANDERING,
    "Gemma3Text": WANDERING | {"pad_token_id": 0, "sliding_window": 16},
    "GPT2": {"vocab_size": 64, "initializer_range": 0.3},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 2, "use_dora": True},
    "rslora": {"r": 8, "variant": "rslora"},
}


def adapt(base: Any, name: str) -> Any:
    torch.manual_seed(sum(map(ord, name)))
    model = attach(base, PeftSection(**ADAPTERS[name])).eval()
    for path, parameter in trainable_parameters(model):
        if "lora_B" in path:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def share(kind: str) -> tuple[Any, Decoder]:
    """A base, and its decoder with all adapters."""
    base, probes = tiny_model(kind, **KINDS[kind]), dict[str, AdapterProbe]()
    for name in ADAPTERS:
        adapted = adapt(base, name)
        probes[name] = probe_adapter(adapted, PROBE)
        base = copy_base(adapted)
    decoder, refusals = build_shared_decoder(base, PROBE, probes)
    assert not refusals
    return base, decoder


def answer_alone(kind: str, prompt: list[int], adapter: AdapterOfRow | None) -> list[int]:
    base = tiny_model(kind, **KINDS[kind])
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if adapter is None:
        return list(base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :])
    model = adapt(base, adapter.name)
    with scaled_adapter(model, adapter.scale):
        return list(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :])


@pytest.mark.parametrize("kind", slow_but(["Llama"], KINDS))
@torch.inference_mode()
def test_rows_join_and_leave_at_any_step_and_each_answers_as_alone(kind: str) -> None:
    base, decoder = share(kind)
    sampler = Sampler(base, generation_options(InferenceSection(), frozenset(), 0), base.device)
    draw = torch.Generator().manual_seed(1)
    choices = [None, *(AdapterOfRow(name, scale) for name in ADAPTERS for scale in (1.0, 0.5))]
    rows = [
        SampledCompletion(
            torch.randint(3, 60, (int(length),), generator=draw).tolist(), NEW, frozenset(), sampler=sampler
        )
        for length in torch.randint(1, 40, (14,), generator=draw)
    ]
    for i, row in enumerate(rows):
        row.adapter = choices[i % len(choices)]
    waiting, batch, left = list(rows), DecodeBatch(decoder, RowSampler(), 1, 8), list[SampledCompletion]()
    while waiting or batch.completions:
        joining = [waiting.pop(0) for _ in range(min(len(waiting), int(torch.randint(0, 4, (), generator=draw))))]
        if joining:
            batch.prefill_rows(joining)
        if len(batch.completions) > 5:
            left.append(batch.completions[0])  # type: ignore[arg-type]
            batch.remove_row(left[-1])
        if 2 * batch.free_slots > len(batch.rows):
            batch.drop_free_slots()
            batch.resize_columns(1)
        if batch.completions:
            batch.step()
    assert left and {len(row.tokens) for row in rows if row not in left} == {NEW}
    for row in rows:
        wanted = answer_alone(kind, list(row.prompt), row.adapter)
        assert row.tokens == wanted[: len(row.tokens)]


def test_an_adapter_beyond_linear_layers_is_refused_with_the_reason() -> None:
    model = attach(tiny_model(), PeftSection(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(UnknownLayerError, match="'lm_head' is trained whole"):
        probe_adapter(model, PROBE)


@torch.inference_mode()
def test_a_seed_draws_the_same_whatever_is_beside() -> None:
    model = tiny_model(**KINDS["Llama"])
    settings = InferenceSection(temperature=1.0, top_k=20)
    decoder, _ = build_shared_decoder(model, PROBE, {})
    sampler = Sampler(model, generation_options(settings, frozenset(), 0), model.device)

    def draw(seeds: list[int]) -> list[list[int]]:
        rows = [
            SampledCompletion(
                PROBE, NEW, frozenset(), sampler=sampler, generator=torch.Generator().manual_seed(seed), top_logprobs=2
            )
            for seed in seeds
        ]
        batch = DecodeBatch(decoder, RowSampler(), len(rows), 40)
        batch.prefill_rows(rows)
        while batch.completions:
            batch.step()
        assert all([step.token for step in row.logprobs] == row.tokens for row in rows)
        assert all(step.logprob <= step.top[0][1] for row in rows for step in row.logprobs)
        return [row.tokens for row in rows]

    together = draw([5, 6, 7])
    assert draw([6]) == [together[1]] and together[0] != together[1] != together[2]
