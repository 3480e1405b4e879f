"""The loss on supervised positions alone equals the loss from full logits; shapes are checked at run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from training_lens.models import kernels

supervised_nll = jaxtyped(typechecker=beartype)(kernels.supervised_nll)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=97, **SMALL),
    "mistral": MistralConfig(vocab_size=97, **SMALL),
    "qwen2": Qwen2Config(vocab_size=97, **SMALL),
    "gemma2": Gemma2Config(vocab_size=97, head_dim=8, final_logit_softcapping=5.0, pad_token_id=0, **SMALL),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_loss_of_full_logits(name: str) -> None:
    model = tiny(name)
    ids = torch.randint(3, 97, (3, 11))
    mask = torch.rand(3, 11) < 0.5
    mask[0, 1] = True
    full = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
    wanted = -full[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:]]
    torch.testing.assert_close(supervised_nll(model, ids, mask), wanted, rtol=1e-5, atol=1e-5)


def test_the_output_layer_is_left_as_it_was() -> None:
    model = tiny("llama")
    supervised_nll(model, torch.randint(3, 97, (1, 5)), torch.ones(1, 5, dtype=torch.bool))
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(input_ids=torch.randint(3, 97, (1, 5))).logits.shape == (1, 5, 97)


def test_padding_changes_no_loss() -> None:
    model = tiny("llama")
    ids, mask = torch.randint(3, 97, (1, 7)), torch.ones(1, 7, dtype=torch.bool)
    padded_ids = torch.cat([ids, torch.full((1, 5), 9)], 1)
    padded_mask = torch.cat([mask, torch.zeros(1, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        supervised_nll(model, padded_ids, padded_mask), supervised_nll(model, ids, mask), rtol=1e-5, atol=1e-6
    )


def test_the_first_token_is_never_a_target() -> None:
    model = tiny("llama")
    only_first = torch.zeros(1, 5, dtype=torch.bool)
    only_first[0, 0] = True
    assert supervised_nll(model, torch.randint(3, 97, (1, 5)), only_first).numel() == 0
