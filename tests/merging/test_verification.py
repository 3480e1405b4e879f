"""A folder passes where it computes what the adapter does, in a process of its own, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_lens.errors import ConfigurationError
from training_lens.inference.session import Session, open_run
from training_lens.merging.merge_tensors import merge_weights, save_merged
from training_lens.merging.verification import (
    TOKENS,
    Probes,
    Reference,
    build_probes,
    compare_outputs,
    compute_reference,
    read_run_rows,
    verify_folder,
)
from training_lens.runs.run_folder import RunFolder

JOB: dict[str, Any] = {
    "class": "AutoModelForCausalLM", "base": None, "revision": None, "trust_remote_code": False, "device": "cpu",
    "untied": False, "stop_ids": [], "pad_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def session(embedded_run: RunFolder) -> Session:
    return open_run(embedded_run, precision="fp32")


@pytest.fixture(scope="module")
def given(embedded_run: RunFolder, session: Session) -> Probes:
    rows, origin = read_run_rows(embedded_run, session, None)
    return build_probes(session, rows[:3], origin)


@pytest.fixture(scope="module")
def wanted(session: Session, given: Probes) -> Reference:
    return compute_reference(session, given)


@pytest.fixture(scope="module")
def merged(embedded_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    session = open_run(embedded_run, precision="fp32")
    save_merged(merge_weights(session.model), session.config.model, folder, "fp32", "5GB")
    return folder


@pytest.fixture
def check(given: Probes, wanted: Reference) -> Callable[[Path], Any]:
    return lambda folder: verify_folder(folder, given, wanted, "fp32", "none", JOB)


@pytest.mark.slow
def test_one_corrupted_tensor_is_found(check: Callable[[Path], Any], merged: Path, tmp_path: Path) -> None:
    for file in merged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5] *= 1.5  # one row of one matrix
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = check(tmp_path)
    assert not found.is_ok and found.max_logit_difference > 1e-3
    assert next(c.name for c in found.checks if not c.is_ok) == "largest logit difference to the adapter"


def logits_of(found: list[torch.Tensor], wanted: Reference, **options: Any) -> Any:
    return compare_outputs(found, options.pop("answers", wanted.answers), wanted, "fp32", "none", **options)


def test_the_base_itself_is_not_the_merged_model(wanted: Reference) -> None:
    found = logits_of(wanted.base, wanted)
    assert not any(c.is_ok for c in found.checks if "logit" in c.name) and found.checks[-1].allowed == 0


def test_what_is_no_number_is_refused_and_null_in_the_report(wanted: Reference) -> None:
    broken = [torch.full_like(z, math.nan) for z in wanted.adapter]
    found = logits_of(broken, wanted)
    assert not found.is_ok and found.as_json()["max_logit_difference"] is None


def test_more_is_allowed_of_rounded_weights(wanted: Reference) -> None:
    near = [z + 0.002 * torch.randn_like(z) for z in wanted.adapter]
    allowed = {t: compare_outputs(near, wanted.answers, wanted, t, "none") for t in ("fp32", "fp16", "bf16")}  # type: ignore[arg-type]
    assert [v.is_ok for v in allowed.values()] == [False, True, True]
    assert allowed["fp16"].checks[0].allowed < allowed["bf16"].checks[0].allowed


def test_answers_may_part_at_a_tie_alone(wanted: Reference) -> None:
    other = [[*wanted.answers[0][:2], 7, 7], *wanted.answers[1:]]
    sure = replace(wanted, margins=[[3.0] * len(a) for a in wanted.answers])
    tied = replace(wanted, margins=[[3.0, 3.0, 0.0, 3.0], *sure.margins[1:]])
    for reference_, ok in ((sure, False), (tied, True)):
        found = logits_of(wanted.adapter, reference_, answers=other)
        assert found.is_ok is ok and found.greedy_agreement == pytest.approx(2 / 3) and found.ties == int(ok)
    longer = [[*wanted.answers[0], 7], *wanted.answers[1:]]
    assert not logits_of(wanted.adapter, wanted, answers=longer).is_ok


def test_half_the_scale_lies_between_base_and_adapter(session: Session, given: Probes, wanted: Reference) -> None:
    half = compute_reference(session, given, 0.5)
    for h, a, b in zip(half.adapter, wanted.adapter, wanted.base, strict=True):
        assert 0 < (h - b).norm() < (a - b).norm()
    assert all(torch.equal(a, b) for a, b in zip(half.base, wanted.base, strict=True))


def test_probes_are_rows_of_the_run_and_their_prompts(embedded_run: RunFolder, session: Session) -> None:
    rows, origin = read_run_rows(embedded_run, session, None)
    given = build_probes(session, rows, origin)
    assert origin == "of the run's validation data" and len(given.rows) == 16 and len(given.prompts) == 8
    for (prompt, room), whole in zip(given.prompts, given.rows, strict=False):
        assert whole[: len(prompt)] == prompt and len(prompt) < len(whole) <= TOKENS and room == 32


def test_without_validation_rows_those_that_trained_are_taken(text_run: RunFolder) -> None:
    session = open_run(text_run, precision="fp32")
    rows, origin = read_run_rows(text_run, session, None)
    given = build_probes(session, rows, origin)
    assert origin == "that the run was trained on" and len(given.rows) == 16
    assert len(given.prompts[0][0]) == len(given.rows[0]) // 2
    with pytest.raises(ConfigurationError, match=r"no rows of nothing.* give data.validation"):
        build_probes(session, [], "of nothing")


def test_the_session_computes_in_the_precision_asked_for(embedded_run: RunFolder) -> None:
    model = open_run(embedded_run, precision="bf16").model
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
