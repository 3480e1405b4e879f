"""The loss on supervised positions alone equals the loss from full logits; shapes are checked at run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from tiny_models import tiny_model

from training_lens.models import token_scores

supervised_scores = jaxtyped(typechecker=beartype)(token_scores.supervised_scores)
paired_scores = jaxtyped(typechecker=beartype)(token_scores.paired_scores)
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "Mixtral": {},
    "OPT": {},
    "GPT2": {},
}


def tiny(kind: str = "Llama") -> Any:
    return tiny_model(kind, **KINDS[kind]).requires_grad_(True)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_loss_of_full_logits(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(3, 97, (3, 11))
    mask = torch.rand(3, 11) < 0.5
    mask[0, 1] = True
    full = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
    wanted = -full[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:]]
    torch.testing.assert_close(supervised_scores(model, ids, mask).nll, wanted, rtol=1e-5, atol=1e-5)


def test_the_output_layer_is_left_as_it_was() -> None:
    model = tiny()
    supervised_scores(model, torch.randint(3, 97, (1, 5)), torch.ones(1, 5, dtype=torch.bool))
    assert "forward" not in model.get_decoder().__dict__
    assert model(input_ids=torch.randint(3, 97, (1, 5))).logits.shape == (1, 5, 97)


def test_padding_changes_no_loss() -> None:
    model = tiny()
    ids, mask = torch.randint(3, 97, (1, 7)), torch.ones(1, 7, dtype=torch.bool)
    padded_ids = torch.cat([ids, torch.full((1, 5), 9)], 1)
    padded_mask = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        supervised_scores(model, padded_ids, padded_mask).nll,
        supervised_scores(model, ids, mask).nll,
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_first_token_is_never_a_target() -> None:
    model = tiny()
    only_first = torch.zeros(1, 5, dtype=torch.bool)
    only_first[0, 0] = True
    assert supervised_scores(model, torch.randint(3, 97, (1, 5)), only_first).nll.numel() == 0


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [97, 300, 10**6])
def test_chunked_scores_equal_those_of_full_logits(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "LOGITS_AT_ONCE", at_once)
    model = tiny(kind)
    ids, mask = torch.randint(3, 97, (3, 11)), torch.rand(3, 11) < 0.5
    with torch.inference_mode():
        scores, logits = supervised_scores(model, ids, mask), model(input_ids=ids).logits[:, :-1][mask[:, 1:]].double()
    targets = ids[:, 1:][mask[:, 1:]]
    wanted = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(scores.nll.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.correct, logits.argmax(-1) == targets)


def test_pairs_are_base_and_adapter_and_their_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "LOGITS_AT_ONCE", 300)
    model = with_adapter(tiny())
    ids, mask = torch.randint(3, 97, (3, 11)), torch.rand(3, 11) < 0.5
    with torch.inference_mode():
        pair, adapter = paired_scores(model, ids, mask), supervised_scores(model, ids, mask)
        q = model(input_ids=ids).logits[:, :-1][mask[:, 1:]].double().log_softmax(-1)
        with model.disable_adapter():
            base = supervised_scores(model, ids, mask)
            p = model(input_ids=ids).logits[:, :-1][mask[:, 1:]].double().log_softmax(-1)
    torch.testing.assert_close(pair.base.nll, base.nll)
    torch.testing.assert_close(pair.adapter.nll, adapter.nll)
    torch.testing.assert_close(pair.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    assert pair.kl.max() > 1e-3 and not torch.equal(pair.base.nll, pair.adapter.nll)


def test_the_divergence_of_a_fresh_adapter_is_zero() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.inference_mode():
        pair = paired_scores(model, torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(pair.kl, torch.zeros(16))


def test_nothing_supervised_has_no_scores() -> None:
    model = with_adapter(tiny())
    ids, mask = torch.randint(3, 97, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    with torch.inference_mode():
        assert supervised_scores(model, ids, mask).nll.numel() == 0
        assert paired_scores(model, ids, mask).kl.numel() == 0
    assert "forward" not in vars(model.get_base_model().get_decoder())
