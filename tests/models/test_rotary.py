"""Whatever an example is packed, padded or answered with: its rotary embedding is the one that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WANDERING, tiny_model
from torch import Tensor

from training_lens.config.schema import ModelSection, PeftSection
from training_lens.models.adapters import attach, trainable_parameters
from training_lens.models.factory import load_model
from training_lens.models.fast.engine import Engine
from training_lens.models.rotary import example_lengths, longest_short_sequence
from training_lens.models.token_scores import paired_scores, supervised_scores

LIMIT = 24  # tokens that the short factors are for
CPU = torch.device("cpu")
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 5.0, 20.0],
        "original_max_position_embeddings": LIMIT,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
}
LENGTHS = [(20, 40, 9), (40, LIMIT), (LIMIT + 1, LIMIT, 3), (12, 15)]


def saved(folder: Path, kind: str) -> ModelSection:
    """A small model of random weights, in the kind's own way of long positions."""
    changes = WANDERING | {"max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2}
    changes["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[kind]}
    if kind == "longrope":
        changes["original_max_position_embeddings"] = LIMIT
    tiny_model("Phi3" if kind == "longrope" else "Llama", **changes).save_pretrained(folder)
    return ModelSection(id=str(folder), dtype="fp32")


def trained(section: ModelSection) -> Any:
    """The base under a moved adapter."""
    torch.manual_seed(1)
    model = attach(load_model(section, CPU, "fp32"), PeftSection(r=2))
    for _, parameter in trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def examples(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, 64, (1, length), generator=generator) for length in lengths]


def padded(rows: Sequence[Tensor]) -> Tensor:
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=2) for row in rows])


def real(rows: Sequence[Tensor]) -> Tensor:
    return padded([torch.ones_like(row) for row in rows]) == 1


@torch.no_grad()
def losses_alone(section: ModelSection, rows: Sequence[Tensor]) -> list[float]:
    """Of each example, summed over its tokens, by plain transformers and PEFT, which never saw another one."""
    import copy

    import transformers

    adapted = trained(section)
    plain = transformers.AutoModelForCausalLM.from_pretrained(section.id)
    adapted.base_model.model.model.rotary_emb = plain.model.rotary_emb
    found = []
    for row in rows:
        fresh = copy.deepcopy(adapted).eval()  # transformers keeps what it last chose
        found.append(float(fresh(input_ids=row, labels=row).loss) * (row.shape[1] - 1))
    return found


@pytest.mark.parametrize(
    ("kind", "lengths"), [*(("longrope", some) for some in LENGTHS), *((kind, LENGTHS[0]) for kind in list(ROPES)[1:])]
)
def test_a_packed_example_has_the_loss_that_it_has_alone(tmp_path: Path, kind: str, lengths: tuple[int, ...]) -> None:
    section, rows = saved(tmp_path, kind), examples(lengths)
    engine = Engine(trained(section).eval())
    assert engine.can_pack
    line = torch.cat(rows, 1)
    found = float(engine.loss_sum(line, torch.ones_like(line, dtype=torch.bool), lengths).detach())
    assert found == pytest.approx(sum(losses_alone(section, rows)), rel=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS[:2], ids=str)
def test_a_padded_example_has_the_loss_that_it_has_alone(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    section, rows = saved(tmp_path, "longrope"), examples(lengths)
    wanted, model = losses_alone(section, rows), trained(section).eval()
    ids, mask = padded(rows), real(rows)
    with torch.no_grad():
        scores = supervised_scores(model, ids, mask, lengths).nll
        pairs = paired_scores(model, ids, mask, torch.tensor(lengths)).adapter.nll
        trains = Engine(model).loss_sum(ids, mask, padded_lengths=lengths)
    for nll in (scores, pairs):
        parts = nll.split([length - 1 for length in lengths])
        assert [float(part.sum()) for part in parts] == pytest.approx(wanted, rel=1e-5)
    assert float(trains) == pytest.approx(sum(wanted), rel=1e-5)


def test_the_two_sets_of_factors_differ_here(tmp_path: Path) -> None:
    section = saved(tmp_path, "longrope")
    (row,) = examples([40])
    alone, together = losses_alone(section, [row[:, :20], row])
    assert longest_short_sequence(load_model(section, CPU, "fp32")) == LIMIT
    with torch.no_grad():
        model = trained(section).eval()
        short = model(input_ids=row[:, :20]).logits
        long = model(input_ids=row).logits[:, :20]
    assert (short - long).abs().max() > 0.1 and alone != together


def test_lengths_are_those_of_runs_from_position_zero() -> None:
    line = torch.tensor([[0, 1, 2, 0, 0, 1], [7, 8, 0, 1, 2, 3]])
    assert example_lengths(line).tolist() == [[3, 3, 3, 1, 2, 2], [9, 9, 4, 4, 4, 4]]
    assert example_lengths(torch.tensor([[30], [4]])).tolist() == [[31], [5]]  # one decoded token of each row
