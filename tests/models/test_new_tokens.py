"""New tokens: rows that start as the mean of their pieces, train alone, and are saved, loaded and merged alike."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_cases import slow_but
from tiny_models import build_tiny_tokenizer, tiny_model

from training_lens import embedded
from training_lens.config.schema import ModelSection, PeftSection, TrainingConfig
from training_lens.errors import AdapterError, ConfigurationError, ModelLoadingError
from training_lens.models.adapter_scale import scaled_adapter
from training_lens.models.adapters import (
    attach,
    base_only,
    load_adapter,
    restore_adapter,
    save_adapter,
    trainable_parameters,
)
from training_lens.models.copies import copy_base, copy_merged
from training_lens.models.embedding_rows import add_tokens, describe_blanks, required_rows, token_ids
from training_lens.models.factory import build_skeleton, load_model, load_tokenizer
from training_lens.models.fast.engine import Engine
from training_lens.models.fast.install import uninstall_kernels

CPU = torch.device("cpu")
TOKENS = ["<tool>", "</tool>", "Zurich-Nord"]
ROWS = 659  # of the embedded tokenizer


@pytest.fixture(scope="session")
def make_base(make_once: Callable[..., Path]) -> Callable[..., ModelSection]:
    """`make_base(kind, tied, spare)`: a small model with the embedded tokenizer, and so many rows without a token."""

    def make(kind: str = "Llama", tied: bool = False, spare: int = 0) -> ModelSection:
        def fill(folder: Path) -> None:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(Path(embedded.PATHS[embedded.MODEL]) / name, folder)
            changes = {"vocab_size": ROWS + spare, "tie_word_embeddings": tied}
            tiny_model(kind, **changes).save_pretrained(folder)

        return ModelSection(id=str(make_once(f"new-tokens-{kind}-{tied}-{spare}", fill)))

    return make


def open_base(section: ModelSection) -> tuple[Any, Any, list[int]]:
    """The base with rows for the tokens, its tokenizer, and the tokens' ids."""
    tokenizer = load_tokenizer(section, new_tokens=TOKENS)
    return load_model(section, CPU, "fp32", TOKENS), tokenizer, token_ids(tokenizer, TOKENS)


def list_ends(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def disturb(adapted: Any) -> Any:
    """Move every trained parameter off its start, always alike."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable_parameters(adapted):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def token_batch(tokenizer: Any) -> torch.Tensor:
    """Two texts of one length with new tokens."""
    rows = [tokenizer(f"a <tool>{i}</tool> b Zurich-Nord", add_special_tokens=False).input_ids for i in (1, 2)]
    return torch.tensor(rows)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("spare", [0, 2, 8])
def test_a_row_starts_as_the_mean_of_its_pieces_and_others_stay(
    make_base: Callable[..., ModelSection], tied: bool, spare: int
) -> None:
    section = make_base(tied=tied, spare=spare)
    before = load_model(section, CPU, "fp32")
    model, tokenizer, ids = open_base(section)
    plain = load_tokenizer(section)
    assert ids == [ROWS, ROWS + 1, ROWS + 2]
    assert (list_ends(model)[0] is list_ends(model)[1]) == tied
    for old, new in zip(list_ends(before), list_ends(model), strict=True):
        assert len(new) == model.config.vocab_size == max(ROWS + spare, ROWS + 3)
        for token, i in zip(TOKENS, ids, strict=True):
            pieces = plain(token, add_special_tokens=False).input_ids
            assert len(pieces) > 1
            torch.testing.assert_close(new[i], old[pieces].mean(0))
        others = [i for i in range(len(old)) if i not in ids]
        assert torch.equal(new[others], old[others])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(TOKENS)
    skeleton = build_skeleton(section, TOKENS)
    assert skeleton.get_output_embeddings().weight.shape == list_ends(model)[1].shape


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_only_these_rows_and_the_adapter_have_a_gradient_and_move(
    make_base: Callable[..., ModelSection], tied: bool
) -> None:
    model, tokenizer, ids = open_base(make_base(tied=tied))
    adapted, batch = attach(model, PeftSection(r=2), ids), token_batch(tokenizer)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    rows = [p for n, p in trainable_parameters(adapted) if "token_adapter" in n]
    assert [tuple(p.shape) for p in rows] == [(3, 32)] * (1 if tied else 2)
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(adapted)], lr=0.1)
    engine, before = Engine(adapted), [p.detach().clone() for p in rows]
    assert engine.kernels.installed["modules with new tokens"] == 2
    engine.loss_sum(batch, torch.ones_like(batch, dtype=torch.bool)).backward()
    optimizer.step()
    assert all((now != then).all(1).all() for now, then in zip(rows, before, strict=True))
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


KINDS = ["Llama", "GPT2", "Gemma2", "Gemma3Text", "Granite", "Cohere", "Qwen2", "Phi3"]


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", slow_but(KINDS, ["Llama", "Gemma2", "GPT2"]))
def test_loss_and_gradients_are_those_of_plain_peft(
    make_base: Callable[..., ModelSection], kind: str, tied: bool
) -> None:
    """Of Gemma with scaled embeddings and capped logits, too."""
    if kind.startswith("Gemma") and not tied:
        pytest.skip("its ends are tied")
    model, tokenizer, ids = open_base(make_base(kind, tied))
    adapted, batch = disturb(attach(model, PeftSection(r=2), ids)).train(), token_batch(tokenizer)
    trained = [p for _, p in trainable_parameters(adapted)]
    plain = adapted(input_ids=batch).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(plain, batch[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(wanted, trained)
    engine = Engine(adapted)
    found = engine.loss_sum(batch, torch.ones_like(batch, dtype=torch.bool))
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, trained), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    uninstall_kernels(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_saved_loaded_merged_scaled_and_switched_off(
    make_base: Callable[..., ModelSection], tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    section = make_base(tied=tied)
    section = section.model_copy(update={"dtype": "fp32" if dtype == torch.float32 else "bf16"})
    model, tokenizer, ids = open_base(section)
    batch = token_batch(tokenizer)
    of_base = logits(model, batch)
    adapted = attach(model, PeftSection(r=2), ids)
    assert torch.equal(logits(adapted, batch), of_base), "a fresh adapter is the base"
    wanted = logits(disturb(adapted), batch)
    save_adapter(adapted, tmp_path)
    with base_only(adapted):
        assert torch.equal(logits(adapted, batch), of_base)
    with scaled_adapter(adapted, 0):
        torch.testing.assert_close(logits(adapted, batch), of_base)
    assert torch.equal(logits(adapted, batch), wanted)
    assert torch.equal(logits(copy_base(adapted), batch), of_base)
    loaded = load_adapter(load_model(section, CPU, "fp32", TOKENS), tmp_path)
    assert torch.equal(logits(loaded, batch), wanted)
    plain = AutoModelForCausalLM.from_pretrained(section.id, dtype=dtype)
    plain.resize_token_embeddings(len(tokenizer))
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(tmp_path)), batch), wanted)
    merged = copy_merged(adapted)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-5)
    assert (list_ends(merged)[0] is list_ends(merged)[1]) == tied
    assert torch.equal(logits(adapted, batch), wanted), "copies change nothing"
    again = attach(load_model(section, CPU, "fp32", TOKENS), PeftSection(r=2), ids)
    restore_adapter(again, tmp_path)
    for (name, mine), (_, theirs) in zip(trainable_parameters(again), trainable_parameters(adapted), strict=True):
        assert torch.equal(mine, theirs), name


def test_without_new_tokens_nothing_changes(make_base: Callable[..., ModelSection]) -> None:
    section = make_base()
    one, other = load_model(section, CPU, "fp32"), load_model(section, CPU, "fp32", [])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert attach(other, PeftSection(r=2)).peft_config["default"].trainable_token_indices is None


WRONG: list[tuple[list[str], str]] = [
    (["<tool>", "<tool>"], "'<tool>' is given 2 times; give each token once"),
    (["<tool> "], r"'<tool> ' begins or ends with white space, .*; strip it"),
    ([""], "given '', which names nothing"),
    (["\n"], r"given '\\n', which names nothing"),
]


@pytest.mark.parametrize(("tokens", "message"), WRONG)
def test_texts_that_cannot_be_tokens_are_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrainingConfig.model_validate({"data": {"new_tokens": tokens}})


def test_tokens_that_the_tokenizer_has_are_refused_all_at_once() -> None:
    tokenizer = load_tokenizer(ModelSection())
    word = next(token for token in sorted(tokenizer.get_vocab()) if token.isascii() and token.isalpha())
    with pytest.raises(ConfigurationError) as error:
        load_tokenizer(ModelSection(), new_tokens=["<tool>", word, tokenizer.eos_token])
    assert [f"{word!r} is a token of 'embedded' already" in problem for problem in error.value.problems] == [
        True,
        False,
    ]
    assert all(problem.endswith("Leave it out.") for problem in error.value.problems)


def test_a_token_that_would_come_back_as_another_text_is_refused() -> None:
    """The decoder of a byte-level tokenizer takes some letters of added tokens for bytes."""
    with pytest.raises(ConfigurationError, match=r"would write 'Zürich' as 'Z.rich'. Give a text of ASCII"):
        load_tokenizer(ModelSection(), new_tokens=["Zürich"])


@pytest.mark.parametrize("kind", ["characters", "turns", "bytes"])
def test_any_kind_of_tokenizer_gives_the_text_back(kind: str) -> None:
    """The blank that some put before a text is no piece of the token."""
    tokenizer = build_tiny_tokenizer(kind)
    before = required_rows(tokenizer)
    (token,) = add_tokens(tokenizer, ["<tool>"], "tiny")
    assert token.id == before and len(token.pieces) == len("<tool>")
    assert tokenizer.decode(tokenizer("a <tool>", add_special_tokens=False).input_ids).strip() == "a <tool>"
    assert required_rows(tokenizer, ["<tool>"]) == before


def test_a_blank_that_the_tokenizer_adds_is_said() -> None:
    for kind, said in (("turns", r"'a<tool>b' as 'a<tool> b', so answers have it that way"), ("bytes", "^$")):
        tokenizer = build_tiny_tokenizer(kind)
        add_tokens(tokenizer, ["<tool>"], "tiny")
        assert re.search(said, describe_blanks(tokenizer, "<tool>"))


def test_an_adapter_without_its_tokens_is_refused_with_the_way_out(
    make_base: Callable[..., ModelSection], tmp_path: Path
) -> None:
    section = make_base()
    model, _, ids = open_base(section)
    save_adapter(attach(model, PeftSection(r=2), ids), tmp_path)
    with pytest.raises(AdapterError, match=r"rows for new tokens up to id 661, and this base has 659 rows. Give its"):
        load_adapter(load_model(section, CPU, "fp32"), tmp_path)
    continued = PeftSection(from_adapter=str(tmp_path), r=2)
    with pytest.raises(AdapterError, match=r"has rows for 3 new tokens, this run for 2. Give the data.new_tokens"):
        attach(load_model(section, CPU, "fp32", TOKENS[:2]), continued, ids[:2])
    attach(load_model(section, CPU, "fp32", TOKENS), continued, ids)


def test_a_lora_on_the_same_module_is_refused_and_whole_modules_train_all_rows(
    make_base: Callable[..., ModelSection],
) -> None:
    section = make_base()
    with pytest.raises(AdapterError, match=r"'lm_head' has rows for data.new_tokens, .*modules_to_save=\[lm_head\]"):
        attach(open_base(section)[0], PeftSection(r=2, target_modules=["lm_head", "q_proj"]), [ROWS])
    adapted = attach(open_base(section)[0], PeftSection(r=2, modules_to_save=["lm_head"]), [ROWS])
    assert adapted.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [ROWS]}


def test_an_output_head_with_a_bias_is_refused(make_base: Callable[..., ModelSection]) -> None:
    """PEFT would leave the bias out of the logits."""
    section = make_base("Phi")
    with pytest.raises(ModelLoadingError, match="its output head has a bias, which PEFT leaves out"):
        load_model(section, CPU, "fp32", TOKENS)
