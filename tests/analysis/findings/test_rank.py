"""Rank: the spectrum alone decides nothing; truncation is measured, exact, and leaves the model as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_cases import slow_but

from training_lens.analysis.findings import Finding, RankCheck, RankLoss, measure_rank, read_rank_check
from training_lens.core.recording import Recording
from training_lens.utils.integrity import read_sealed, write_sealed

Find = Callable[..., Finding]
CHECK = RankCheck(
    step=200, rows=50, supervised_tokens=900, base_loss=3.0, loss=2.0, loss_error=0.02, ranks={"q_proj": 16},
    energy_ranks={"q_proj": 2}, at_energy_ranks=RankLoss(None, 2.002, 0.002, -0.001, 0.005),
    at_fixed_ranks=(RankLoss(1, 2.3, 0.3, 0.2, 0.4), RankLoss(4, 2.001, 0.001, 0.0, 0.002)), rank_pattern={"q_proj": 2},
)  # fmt: skip


@pytest.fixture
def few_directions(
    healthy: Any, record: Callable[..., Recording], checks: dict[str, Any]
) -> Callable[[RankCheck | None], Finding]:
    """What is said where 2 of 16 directions hold the energy, with this rank check."""

    def find(check: RankCheck | None) -> Finding:
        healthy.values("spectra", "energy_rank")[:] = 2
        recording = record(healthy.tables, {"total_steps": 200})
        if check is not None:
            check.write(recording.folder)
        found: Finding = checks["rank"](recording)
        return found

    return find


def test_the_spectrum_alone_decides_nothing(few_directions: Any) -> None:
    found = few_directions(None)
    assert found.confidence == "inconclusive" and "training-lens rank" in found.decide


def test_few_directions_and_an_unchanged_loss_are_a_rank_too_large(few_directions: Any) -> None:
    found = few_directions(CHECK)
    assert found.title == "A smaller rank is enough" and "{q_proj: 2}" in found.action


def test_few_directions_that_lose_without_the_others_are_not(few_directions: Any) -> None:
    found = few_directions(replace(CHECK, at_energy_ranks=RankLoss(None, 2.2, 0.2, 0.1, 0.3)))
    assert found.severity == "fine" and "rank 4 in all modules does not change it" in found.measured


@pytest.mark.parametrize(
    "check",
    [
        replace(CHECK, step=100),
        replace(CHECK, base_loss=1.9),
        replace(CHECK, at_energy_ranks=RankLoss(None, 2.0, 0.0, None, None)),
    ],
    ids=["of an earlier step", "no gain", "one row"],
)
def test_a_check_that_does_not_decide_says_so(few_directions: Any, check: RankCheck) -> None:
    assert few_directions(check).confidence == "inconclusive"


def test_many_directions_are_a_rank_that_is_used(finding: Find, healthy: Any) -> None:
    assert finding("rank", healthy).severity == "fine"


def test_a_rank_that_is_used_whole_may_be_too_small(finding: Find, healthy: Any) -> None:
    healthy.values("spectra", "energy_rank")[:] = 15
    found = finding("rank", healthy)
    assert found.confidence == "inconclusive" and "--test rank" in found.decide


def test_a_damaged_check_is_passed_over_with_a_warning(few_directions: Any, tmp_path: Any, caplog: Any) -> None:
    (tmp_path / "rank_check.json").write_text('{"step": 1')
    assert read_rank_check(tmp_path) is None
    assert "measure it again" in caplog.text


@pytest.fixture(scope="module")
def run(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the finished run, for the check is written into it."""
    return type(finished_run)(Path(shutil.copytree(finished_run.root, tmp_path_factory.mktemp("checked") / "run")))


@pytest.fixture(scope="module")
def check(run: Any) -> RankCheck:
    return measure_rank(run, max_examples=24)


def test_a_check_of_an_earlier_version_still_opens(tmp_path: Path) -> None:
    """Before `training-lens rank` there were neither larger shares nor counts of parameters."""
    path = CHECK.write(tmp_path)
    values = {k: v for k, v in read_sealed(path).items() if k not in ("at_larger_shares", "parameters")}
    for at in (values["at_energy_ranks"], *values["at_fixed_ranks"]):
        del at["share"], at["parameters"]
    write_sealed(path, values)
    assert read_rank_check(tmp_path) == CHECK and [at.label for at in CHECK.truncations] == ["90%", "1", "4"]


def test_the_check_is_kept_in_the_run(run: Any, check: RankCheck) -> None:
    assert read_rank_check(run.root) == check == read_rank_check(run.root / "lens")


def test_a_smaller_rank_never_has_more_energy_and_the_whole_loses_nothing(run: Any, check: RankCheck) -> None:
    """The base is the limit at no rank at all, and more directions come nearer to the whole adapter."""
    assert [at.rank for at in check.at_fixed_ranks] == [1, 2, 4, 8]
    deltas = [abs(at.delta) for at in check.at_fixed_ranks]
    assert deltas[0] > 10 * deltas[-1] and check.loss < check.at_fixed_ranks[0].loss < check.base_loss
    for at in check.at_fixed_ranks:
        assert at.low is not None and at.high is not None and at.low <= at.delta <= at.high
        assert at.delta == pytest.approx(at.loss - check.loss)


def test_energy_ranks_are_those_of_the_dense_update(run: Any, check: RankCheck) -> None:
    from training_lens.merging.weight_update import LowRankUpdate, load_updates

    updates = load_updates(run.adapter)
    for name, rank in check.energy_ranks.items():
        update = updates[f"{name}.weight"]
        assert isinstance(update, LowRankUpdate)
        energy = torch.linalg.svdvals(update.b.double() @ update.a.double()).square()
        assert rank == int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
    assert check.rank_pattern["q_proj"] == max(r for n, r in check.energy_ranks.items() if n.endswith("q_proj"))


@pytest.mark.parametrize("peft", [{}, {"use_dora": True}, {"variant": "rslora"}], ids=["lora", "dora", "rslora"])
def test_truncation_is_the_best_of_its_rank_and_is_undone_bit_for_bit(peft: dict[str, Any]) -> None:
    from training_lens.analysis.findings.rank_check import truncate_modules
    from training_lens.config.schema import ModelSection, PeftSection
    from training_lens.core.modules import adapter_modules
    from training_lens.models.adapters import attach
    from training_lens.models.factory import load_model

    torch.manual_seed(0)
    model = attach(load_model(ModelSection(), torch.device("cpu"), "fp32"), PeftSection(r=8, **peft))
    modules = adapter_modules(model)
    with torch.no_grad():
        for module in modules:
            module.b.normal_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = {m.name: (m.b @ m.a).detach().double() for m in modules}
    with truncate_modules(modules, {m.name: 3 for m in modules}):
        for m in modules:
            left = torch.linalg.svdvals(dense[m.name] - (m.b @ m.a).detach().double())
            singular = torch.linalg.svdvals(dense[m.name])
            np.testing.assert_allclose(left[:5], singular[3:8], rtol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("keep", slow_but(["4"], ["90%", "4"]))
def test_a_smaller_adapter_is_what_was_measured_and_any_loader_scales_it_right(
    run: Any, check: RankCheck, tmp_path: Path, keep: str
) -> None:
    from training_lens.analysis.run_rows import RowOptions
    from training_lens.analysis.smaller_adapter import find_truncation, write_smaller_adapter
    from training_lens.merging.weight_update import LowRankUpdate, load_updates
    from training_lens.models.adapter_files import read_config

    at, folder = find_truncation(check, keep), tmp_path / "small"
    written = write_smaller_adapter(run, folder, at, check.gain, RowOptions(max_examples=24))
    assert written.loss == pytest.approx(at.loss, abs=1e-4) and written.largest_error < 1e-6
    settings, whole, count = read_config(folder), load_updates(run.adapter), 0
    for name, cut in load_updates(folder).items():
        source = whole[name]
        assert isinstance(cut, LowRankUpdate) and isinstance(source, LowRankUpdate)
        assert cut.factor == 1
        rank = len(cut.a)
        assert settings["rank_pattern"].get(name.removesuffix(".weight"), settings["r"]) == rank
        count += cut.a.numel() + cut.b.numel()
        dense = source.factor * (source.b.double() @ source.a.double())
        u, s, v = torch.linalg.svd(dense)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (cut.b.double() @ cut.a.double() - best).norm() < 1e-5 * dense.norm()
    assert count == written.parameters == at.parameters


def test_a_truncation_that_was_not_measured_is_refused() -> None:
    from training_lens.analysis.smaller_adapter import find_truncation
    from training_lens.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="give one of 90%, 1, 4"):
        find_truncation(CHECK, "2")


@pytest.mark.parametrize(("tokens", "title"), [(600, "The rank may be too small"), (700, "The rank may be saturated")])
def test_a_full_rank_is_saturated_where_an_epoch_holds_over_two_bits_a_parameter(
    finding: Find, healthy: Any, tokens: int, title: str
) -> None:
    healthy.values("spectra", "energy_rank")[:] = 16
    healthy.values("loss", "loss")[:] = np.log(2)  # a bit for each token, in 100 steps of an epoch
    healthy.tables["loss"][1]["supervised_tokens"] = np.full(200, tokens)
    found = finding("rank", healthy)
    assert (found.title, found.confidence) == (
        title,
        "inconclusive",
    )  # 16 modules of rank 16, 64 wide: 32,768 parameters
    assert found.decide.startswith("training-lens analyze RUN --test rank")
    assert found.evidence.get("bits_per_parameter", 0) == pytest.approx(100 * tokens / 32768 if tokens == 700 else 0)
