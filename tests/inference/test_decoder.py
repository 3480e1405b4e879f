"""The decoder says what the session's model says and leaves it as it is; what it cannot run goes to `generate`."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from answer_ids import answer_ids
from slow_cases import mark_slow
from tiny_models import WANDERING, tiny_model

from training_lens import TrainingConfig
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.config.schema import PeftSection
from training_lens.data.examples import Message
from training_lens.inference import decoder as subject
from training_lens.inference.generator import answer
from training_lens.inference.session import LoadedModel, Session, build_session, open_session
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.fused_layers import DecodingAttention
from training_lens.models.fast.fused_linear import FusedLinear
from training_lens.models.fast.tolerance import WHOLE_MODEL, is_close

SETTINGS = InferenceSection(max_new_tokens=12)
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, in which nothing counts as said before."""
    subject.log_once.cache_clear()
    caplog.set_level(logging.INFO, "training_lens")
    return caplog


def adapted(precision: str = "fp32", size: float = 0.1) -> Session:
    """The embedded model with a random adapter, whose B is of this size."""
    values = {"inference": {"adapter": "none"}, "training": {"precision": precision}}
    base = open_session(TrainingConfig.model_validate(values))
    torch.manual_seed(0)
    model = attach(base.model, PeftSection(r=4)).eval()
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name:
            parameter.data = size * torch.randn_like(parameter)
    return build_session(LoadedModel(model, base.tokenizer, base.device, base.precision), base.config, False)


def prompt(session: Session, text: str = "What is 3 plus 4?") -> list[int]:
    return session.prompt_ids([Message("user", text)])


def generated(session: Session, ids: list[int], **options: Any) -> list[int]:
    out = session.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=SETTINGS.max_new_tokens,
        eos_token_id=sorted(session.stop_ids),
        pad_token_id=session.pad_id,
        **({"do_sample": False} | options),
    )[0, len(ids) :].tolist()
    return [token for token in out if token not in session.stop_ids]


@pytest.mark.parametrize("base", [False, mark_slow(True)])
def test_the_model_is_the_same_to_the_bit_after_it_answered(base: bool) -> None:
    session = adapted("bf16")
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in session.model.named_modules()]
    answer(session, prompt(session), SETTINGS, base=base)
    after = session.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [(name, type(module), module.training) for name, module in session.model.named_modules()]


@pytest.mark.parametrize(
    ("precision", "size", "is_trained"),
    [
        mark_slow(("fp32", 0.1, False)),
        mark_slow(("fp32", 0.1, True)),
        ("bf16", 0.5, False),  # merged, or beside the weights, by what merging would lose of each value
        mark_slow(("bf16", 1e-4, True)),
    ],
    ids=["merged", "merged, in training", "in bfloat16", "unmerged, in training"],
)
def test_answers_do_not_depend_on_the_decoders_before(precision: str, size: float, is_trained: bool) -> None:
    """As the adapter changes, a session answers as one that has just been opened, bit for bit."""
    session = adapted(precision, size)
    if is_trained:
        Engine(session.model, precision)  # its kernels move weights together
    ids = prompt(session)
    first = answer_ids(session, [ids], SETTINGS)
    made = session.decoders.get_decoder(session.model, False, ids)
    assert made is session.decoders.get_decoder(session.model, False, ids)
    weights = [p.clone() for name, p in session.model.named_parameters() if "lora_" not in name]
    for _ in range(2):
        for name, parameter in trainable_parameters(session.model):
            if "lora_B" in name:
                parameter.data *= -3 if size > 1e-3 else -1
        answered = answer_ids(session, [ids], SETTINGS)
        made = session.decoders.get_decoder(session.model, False, ids)
        fresh = subject.build_decoder(session.model, False, torch.tensor([ids]))
        assert torch.equal(logits(made, ids), logits(fresh, ids))
        if precision == "fp32":  # in bfloat16, merging may change an answer
            assert answered == [generated(session, ids)] != first
    after = [p for name, p in session.model.named_parameters() if "lora_" not in name]
    assert all(map(torch.equal, weights, after))


@pytest.mark.parametrize("part", ["lora_B", "lora_magnitude", "modules_to_save", "trainable_tokens_delta"])
def test_a_step_of_any_part_of_an_adapter_is_in_the_next_answer(part: str) -> None:
    """Whatever decoding prepares: merged weights, a norm's 1 + w, an embedding; and whatever optimizer writes them."""
    base = tiny_model("Gemma3Text", **WANDERING)
    model = attach(base, PeftSection(r=2, use_dora=True, modules_to_save=["norm"]), new_ids=[5]).eval()
    ids, decoders = list(range(3, 15)), subject.DecoderCache()
    before = logits(decoders.get_decoder(model, False, ids), ids)
    changed = [p for name, p in trainable_parameters(model) if part in name]
    for parameter in changed:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(changed, lr=0.3, fused=True).step()  # as in training
    wanted = model(input_ids=torch.tensor([ids])).logits[0].detach()
    now = logits(decoders.get_decoder(model, False, ids), ids)
    assert is_close(now, wanted[-len(now) :], WHOLE_MODEL) and not is_close(now, before, WHOLE_MODEL)


def logits(decoder: Any, ids: list[int]) -> torch.Tensor:
    return subject.decode_probe(decoder, ids)


@pytest.mark.slow
def test_a_decoder_is_built_anew_where_more_than_the_adapter_changed() -> None:
    session = adapted()
    ids = prompt(session)
    made = session.decoders.get_decoder(session.model, False, ids)
    with torch.no_grad():
        session.model.get_base_model().model.norm.weight *= 1.5
    assert answer_ids(session, [ids], SETTINGS) == [generated(session, ids)]
    assert session.decoders.get_decoder(session.model, False, ids) is not made


@pytest.mark.slow
def test_copies_of_weights_that_take_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    session = adapted()
    ids = prompt(session)
    made = session.decoders.get_decoder(session.model, False, ids)
    session.decoders.clear_if_large(session.model)
    assert session.decoders.get_decoder(session.model, False, ids) is made
    size = sum(p.numel() * p.element_size() for p in session.model.parameters())
    monkeypatch.setattr(subject, "available_bytes", lambda _device: 20 * size)
    session.decoders.clear_if_large(session.model)
    assert session.decoders.get_decoder(session.model, False, ids) is not made


@contextmanager
def no_collection() -> Iterator[None]:
    """Within it, only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(("training", "base"), [(False, False), (True, True)], ids=["loaded", "base of a training"])
def test_the_decoders_weights_are_freed_with_it(training: bool, base: bool) -> None:
    session = adapted(size=0.5)
    if training:
        Engine(session.model)  # its modules are computed by kernels, which hold copies of weights
    with no_collection():
        decoder = subject.build_decoder(session.model, base, torch.tensor([prompt(session)]))
        parts = [weakref.ref(module) for module in decoder.model.modules()]
        assert len(parts) > 50
        del decoder
        assert not [part() for part in parts if part() is not None]


def test_a_session_is_freed_although_its_template_fails_at_chats_with_tools() -> None:
    def use_session() -> Any:
        session = adapted()
        return weakref.ref(session)

    with no_collection():
        assert use_session()() is None


def test_what_listens_to_the_model_is_not_copied() -> None:
    session, heard = adapted(), list[int]()

    class Listener:
        def __call__(self, *_given: Any) -> None:
            heard.append(1)

        def __deepcopy__(self, _memo: Any) -> Any:
            raise TypeError("holds an open file")

    session.model.get_base_model().model.layers[0].register_forward_hook(Listener())
    ids = prompt(session)
    assert answer_ids(session, [ids], SETTINGS) == [generated(session, ids)] and heard


def test_an_adapter_is_merged_where_that_loses_nothing_of_it() -> None:
    session = adapted()
    made = subject.build_decoder(session.model, False, torch.tensor([prompt(session)]))
    products = [module for module in made.model.modules() if isinstance(module, FusedLinear)]
    assert products and not any(product.has_adapter for product in products)


@pytest.mark.slow
def test_an_adapter_that_rounding_would_lose_stays_beside_the_weights(told: pytest.LogCaptureFixture) -> None:
    session = adapted("bf16", size=1e-4)
    made = subject.build_decoder(session.model, False, torch.tensor([prompt(session)]))
    products = [module for module in made.model.modules() if isinstance(module, FusedLinear)]
    assert any(product.has_adapter for product in products)
    subject.build_decoder(session.model, False, torch.tensor([prompt(session)]))
    (line,) = [record.getMessage() for record in told.records]
    assert line.startswith("the adapter answers unmerged: in bfloat16, merging would change ")


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("Mamba", {"state_size": 4}, "mamba keeps something else than keys and values"),
        ("Bloom", {"n_head": 2}, "BloomForCausalLM cannot be decoded row by row"),
        (
            "Llama4Text",
            {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
            | {"intermediate_size_mlp": 16, "num_local_experts": 2},
            "layers of chunked_attention",
        ),
    ],
)
def test_what_cannot_be_decoded_is_said_once(
    kind: str, sizes: dict[str, int], reason: str, told: pytest.LogCaptureFixture
) -> None:
    config = getattr(transformers, f"{kind}Config")(**TINY, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    decoders = subject.DecoderCache()
    for base in (False, True):
        assert decoders.get_decoder(model, base, list(range(20))) is None
    (line,) = [record.getMessage() for record in told.records]
    assert line.startswith("answers come from the model's own generate: ") and reason in line


def test_settings_beyond_the_choice_of_a_token_are_generates_own(told: pytest.LogCaptureFixture) -> None:
    session = adapted()
    session.model.generation_config.num_beams = 3
    ids = prompt(session)
    assert answer_ids(session, [ids], SETTINGS) == [generated(session, ids)]
    (line,) = [record.getMessage() for record in told.records]
    assert line == "answers come from the model's own generate: its generation config asks for beam search"


@pytest.mark.slow
def test_without_memory_for_copies_the_model_decodes_with_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    session = adapted()
    ids = prompt(session)
    wanted = generated(session, ids)
    monkeypatch.setattr(subject, "available_bytes", lambda _device: 0)
    assert answer_ids(session, [ids], SETTINGS) == [wanted]
    made = session.decoders.get_decoder(session.model, False, ids)
    assert made and not any(isinstance(module, DecodingAttention | FusedLinear) for module in made.model.modules())


def test_a_sample_is_what_generate_draws_from_the_same_seed() -> None:
    session = adapted()
    ids = prompt(session)
    settings = SETTINGS.model_copy(update={"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 3})
    torch.manual_seed(3)
    wanted = generated(session, ids, do_sample=True, temperature=1.5, top_p=0.9, top_k=40)
    assert answer(session, ids, settings) == session.tokenizer.decode(wanted, skip_special_tokens=True)
