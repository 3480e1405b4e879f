"""What dropout drops depends on the seed, the step, the example, the token's place and the layer, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import tiny_model
from torch import Tensor, nn

from training_lens.config.schema import PeftSection
from training_lens.models.adapters import attach
from training_lens.models.factory import checkpoint_gradients
from training_lens.models.fast import token_dropout
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import DropoutKernel, installed_kernels
from training_lens.models.fast.token_dropout import TokenDraws, draw_example_keys, draw_token_keys, drop_columns

LENGTHS = (9, 2, 7)
SHARE = 0.3


def adapted(kind: str = "Llama", **peft: Any) -> Any:
    """A model in training, with an adapter that changes what it computes, and drops."""
    model = attach(tiny_model(kind), PeftSection(r=4, lora_dropout=SHARE, **peft)).train()
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]


def gradients(model: Any, engine: Engine, order: tuple[int, ...], packed: bool, step: int = 5) -> dict[str, Tensor]:
    """Of the summed loss of these examples in one batch, with the loss itself."""
    ids, keys = [examples()[i] for i in order], draw_example_keys(3, step, order)
    lengths = tuple(LENGTHS[i] for i in order)
    if packed:
        tokens = torch.cat(ids, 1)
        loss = engine.row_losses(tokens, torch.ones_like(tokens, dtype=torch.bool), lengths, (), keys)[0]
    else:
        tokens = torch.cat([nn.functional.pad(part, (0, max(lengths) - part.shape[1])) for part in ids])
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        loss = engine.row_losses(tokens, mask, (), lengths, keys)[0]
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in wanted:
        most = 2e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=max(1e-6, most))


@pytest.mark.parametrize("kind", slow_but(["Llama"], ["Llama", "Phi3", "Gemma2", "Mixtral"]))
@pytest.mark.parametrize("dora", [False, True])
def test_examples_drop_the_same_alone_together_packed_and_padded(kind: str, dora: bool) -> None:
    model = adapted(kind, use_dora=dora, **({"target_parameters": []} if kind == "Mixtral" else {}))
    engine = Engine(model)
    alone = [gradients(model, engine, (i,), packed=engine.can_pack) for i in range(len(LENGTHS))]
    wanted = {name: torch.stack([part[name] for part in alone]).sum(0) for name in alone[0]}
    for order in ((0, 1, 2), (2, 0, 1)):
        for packed in {engine.can_pack, False}:
            same(gradients(model, engine, order, packed), wanted)
    other = gradients(model, engine, (0, 1, 2), engine.can_pack, step=6)
    assert float((other["loss"] - wanted["loss"]).abs()) > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_kernels_give_what_the_modules_give_that_they_stand_for(dora: bool) -> None:
    model = adapted(use_dora=dora)
    engine = Engine(model)
    found = gradients(model, engine, (0, 1, 2), packed=True)
    for kernel in installed_kernels(model):
        if not isinstance(kernel, DropoutKernel):
            del kernel.module.forward
    same(found, gradients(model, engine, (0, 1, 2), packed=False))


def test_a_recomputed_pass_drops_the_same() -> None:
    wanted, model = adapted(), adapted()
    expected = gradients(wanted, Engine(wanted), (0, 1, 2), packed=True)
    checkpoint_gradients(model)
    found = gradients(model, Engine(model), (0, 1, 2), packed=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_models_own_dropout_is_that_of_its_tokens_too() -> None:
    """GPT-2 drops embeddings and what goes into the residual stream; its attention's is left out here."""
    model = attach(tiny_model("GPT2", resid_pdrop=SHARE, embd_pdrop=SHARE), PeftSection(r=4)).train()
    engine = Engine(model)
    assert engine.kernels.installed["dropouts"] > 0
    alone = [gradients(model, engine, (i,), packed=False)["loss"] for i in range(len(LENGTHS))]
    together = gradients(model, engine, (2, 1, 0), packed=False)["loss"]
    torch.testing.assert_close(together, torch.stack(alone).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_kernel_in_c_and_torch_drop_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    draws = draw((40,), 1)
    found = drop_columns(x, draws, SHARE)
    with monkeypatch.context() as patch:
        patch.setattr(token_dropout, "can_compute", lambda *_: False)
        assert torch.equal(found, drop_columns(x, draws, SHARE))
    kept = found != 0
    torch.testing.assert_close(found[kept], x[kept] / (1 - SHARE))


def draw(lengths: tuple[int, ...], step: int, layer: str = "layer") -> Tensor:
    """What the tokens of examples of these lengths draw in a step."""
    keys = draw_example_keys(0, step, range(len(lengths)))
    draws = TokenDraws()
    name = draws.add_layer(layer)
    draws.begin_pass(draw_token_keys(keys, lengths, None))
    found = draws.find(name, sum(lengths))
    assert found is not None
    return found


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_masks_are_as_random_as_independent_draws(share: float) -> None:
    """Means of rows and columns, their spread, and the agreement of neighbours: within five standard deviations."""
    tokens, width = 2000, 512
    ones = torch.ones(tokens, width)
    dropped = {
        key: drop_columns(ones, draw((tokens // 4,) * 4, *key), share) == 0
        for key in ((1, "layer"), (2, "layer"), (1, "other"))
    }
    mask = dropped[1, "layer"].double()
    spread = (share * (1 - share)) ** 0.5
    assert abs(float(mask.mean()) - share) < 5 * spread / (tokens * width) ** 0.5
    for axis, count in ((0, tokens), (1, width)):
        scores = (mask.mean(axis) - share) * count**0.5 / spread
        assert float(scores.abs().max()) < 5 and float(scores.std()) == pytest.approx(1, abs=0.15)
    centred = (mask - share) / spread
    others = [(dropped[key].double() - share) / spread for key in ((2, "layer"), (1, "other"))]
    pairs = [(centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[:500], centred[500:1000])]
    for one, other in (*pairs, *((centred, o) for o in others)):
        assert abs(float((one * other).mean())) < 5 / one.numel() ** 0.5
    columns = (centred.T @ centred) / tokens**0.5  # each pair of columns: of standard deviation 1
    off = columns[~torch.eye(width, dtype=torch.bool)]
    assert float(off.std()) == pytest.approx(1, abs=0.05) and float(off.abs().max()) < 6.5


def test_without_keys_and_in_evaluation_dropout_is_torchs() -> None:
    model = adapted()
    engine = Engine(model)
    ids = examples()[0]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        one, other = (float(engine.loss_sum(ids, mask, (ids.shape[1],))) for _ in range(2))
        assert one != other
        model.eval()
        keys = draw_example_keys(0, 1, [0])
        assert engine.loss_sum(ids, mask, (ids.shape[1],)) == engine.row_losses(ids, mask, (9,), (), keys)[0]
