"""Runs combined into one: what it computes, what it is scored by, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from training_lens.analysis.chosen_scale import choose_scale
from training_lens.analysis.page.run_row import read_run_row
from training_lens.analysis.run_rows import RowOptions
from training_lens.combining.combine_recipe import build_recipe
from training_lens.combining.combine_runs import Combination, Measurement, combine_runs
from training_lens.combining.parents import open_parents
from training_lens.config.evaluation_sections import EvaluationSection
from training_lens.display.progress import Progress
from training_lens.errors import AdapterError, ConfigurationError, TrainingLensError
from training_lens.evaluation.run_evaluation import ModelEvaluator
from training_lens.inference.heldout_examples import validation_examples
from training_lens.inference.session import open_run
from training_lens.integrations.hub_files import PathShortener, build_metadata_files
from training_lens.integrations.model_card import render_model_card
from training_lens.integrations.record import RunRecord
from training_lens.merging.weight_update import LowRankUpdate, load_updates
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.runs.run_listing import read_run
from training_lens.utils.integrity import read_sealed

FEW = EvaluationSection(resamples=100, generate=False)
IDS = torch.arange(40, 72).view(2, 16)
Train = Callable[..., RunFolder]


def combine(runs: Sequence[RunFolder], target: Path, how: Any = "cat", **settings: Any) -> Combination:
    rows = settings.pop("rows", RowOptions())
    recipe = build_recipe(how, len(runs), **settings)
    parents = open_parents(runs, recipe)
    return combine_runs(parents, recipe, RunFolder(target), Measurement(rows, FEW), Progress())


@pytest.fixture(scope="module")
def both(hill_and_forest: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Combination:
    return combine(hill_and_forest, tmp_path_factory.mktemp("both") / "run", weights=(0.9, 0.7))


def copy_run(run: RunFolder, folder: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(run.root, folder / run.run_id)))


def evaluated_loss(run: RunFolder, rows_of: RunFolder | None = None) -> float:
    session = open_run(run)
    given = rows_of or run
    examples = validation_examples(given, open_run(given))
    (outcome,) = ModelEvaluator(session, FEW).evaluate(examples).outcomes.values()
    return outcome.scored.measure_all()["loss"]


def test_the_run_computes_the_base_plus_the_weighted_updates(
    both: Combination, hill_and_forest: list[RunFolder]
) -> None:
    """Of rsLoRA and LoRA, of two ranks, on modules that only one of them adapts."""
    session = open_run(both.run, precision="fp32")
    with torch.inference_mode():
        logits = session.model.eval()(input_ids=IDS).logits
    base = open_run(hill_and_forest[0], precision="fp32").model.unload()
    weights = dict(base.named_parameters())
    for run, weight in zip(hill_and_forest, (0.9, 0.7), strict=True):
        for name, update in load_updates(run.adapter).items():
            assert isinstance(update, LowRankUpdate)
            weights[name].data += weight * update.factor * (update.b @ update.a)
    with torch.inference_mode():
        wanted = base.eval()(input_ids=IDS).logits
        with base_only(session.model):
            alone = session.model(input_ids=IDS).logits
    assert (logits - wanted).abs().max() < 1e-4 * (wanted - alone).abs().max()


def test_the_scores_are_those_of_evaluate(both: Combination, hill_and_forest: list[RunFolder]) -> None:
    for task, run in zip(both.tasks, hill_and_forest, strict=True):
        assert task.name == run.run_id and set(task.losses) == {"base", "hill", "forest", "combination"}
        assert task.losses[run.run_id] == pytest.approx(evaluated_loss(run), rel=1e-5)
        assert task.losses["combination"] == pytest.approx(evaluated_loss(both.run, run), rel=1e-5)
        assert task.change == task.losses["combination"] - task.losses[task.name]
        assert task.change_interval and task.change_interval[0] <= task.change <= task.change_interval[1]
    summary = read_sealed(both.run.metadata / "summary.json")
    assert summary["status"] == "finished" and summary["validation_loss"] == pytest.approx(evaluated_loss(both.run))


def test_it_is_a_run_with_the_prompts_domains_and_rows_of_all(both: Combination) -> None:
    session = open_run(both.run)
    assert session.domains == ("forest", "hill") and both.has_all_rows
    found = validation_examples(both.run, session)
    assert {example.domain for example in found} == {"forest", "hill"}
    assert ModelEvaluator(session, FEW).evaluate(found).comparison.trained.as_json()["checked"]
    record = read_sealed(both.run.combination_record)
    assert record["weights"] == [0.9, 0.7] and [run["name"] for run in record["runs"]] == ["hill", "forest"]
    assert all(check["ok"] for check in record["checks"]) and record["warnings"] == both.warnings
    adapter = json.loads((both.run.adapter / "adapter_config.json").read_text())
    assert adapter["r"] == 10 and "use_rslora" not in adapter and set(adapter["rank_pattern"].values()) == {4}


def test_a_chosen_scale_is_part_of_the_update(hill_and_forest: list[RunFolder], tmp_path: Path) -> None:
    scaled = copy_run(hill_and_forest[0], tmp_path)
    choose_scale(scaled, 0.5)
    found = combine([scaled, hill_and_forest[1]], tmp_path / "half", weights=(1.0, 1.0))
    weighed = combine(hill_and_forest, tmp_path / "weighed", weights=(0.5, 1.0))
    assert found.as_json()["runs"][0]["adapter_scale"] == 0.5
    assert found.tasks[0].losses["combination"] == pytest.approx(weighed.tasks[0].losses["combination"], rel=1e-5)


@pytest.mark.parametrize("how", ["svd", "ties", "dare"])
def test_a_smaller_rank_is_written_and_measured(how: Any, hill_and_forest: list[RunFolder], tmp_path: Path) -> None:
    found = combine(hill_and_forest, tmp_path / how, how, rank=3)
    assert set(found.adapter.ranks.values()) == {3} and 0 < found.adapter.least_kept[1] < 1
    assert found.tasks[0].losses["combination"] == pytest.approx(
        evaluated_loss(found.run, hill_and_forest[0]), rel=1e-5
    )


def test_a_combination_worse_than_the_base_is_said(hill_and_forest: list[RunFolder], tmp_path: Path) -> None:
    found = combine(hill_and_forest, tmp_path / "spoilt", weights=(-3.0, 1.0))
    assert found.tasks[0].is_worse_than_base
    assert "on the rows of hill the combination is worse than the base" in found.warnings[0]


def test_held_out_rows_of_all_runs_stay_held_out(train_domain: Train, tmp_path: Path) -> None:
    data = {"val_ratio": 0.2, "validation": None}
    runs = [train_domain(tmp_path / "outputs", domain, data=data) for domain in ("hill", "lake")]
    found = combine(runs, tmp_path / "both", "linear")
    ids = [run.read_metadata("held_out.json") for run in runs]
    session = open_run(found.run)
    assert {e.id for e in validation_examples(found.run, session)} == {*ids[0], *ids[1]}
    assert [task.rows for task in found.tasks] == [len(one) for one in ids]
    assert found.adapter.from_sum > 0


def test_rows_that_another_run_trained_on_are_said(
    hill_and_forest: list[RunFolder], train_domain: Train, domain_rows: Any, tmp_path: Path
) -> None:
    data = {"train": domain_rows("hill")["validation"], "answer_in_prompt": "allow"}
    leaking = train_domain(tmp_path / "outputs", "lake", data=data)
    tasks = combine([hill_and_forest[0], leaking], tmp_path / "both").tasks
    assert tasks[0].trained.leaked is not None and tasks[0].trained.leaked.all()


def test_ranks_that_differ_are_refused_for_linear(hill_and_forest: list[RunFolder], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has 4 in hill and 6 in forest\. --how cat .* --how svd"):
        combine(hill_and_forest, tmp_path / "run", "linear")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"peft": {"use_dora": True}}, "is a DoRA"),
        ({"peft": {"modules_to_save": ["norm"]}}, "has trained 'model.norm.weight' itself"),
        ({"data": {"new_tokens": ["<note>"]}}, "has trained '(lm_head|model.embed_tokens).weight' itself"),
        ({"data": {"template": "alpaca"}}, "trained with different prompts"),
        ({"data": {"domain": {"style": "hash"}}}, "trained with different prompts"),
    ],
)
def test_what_cannot_be_combined_rightly_is_refused(
    sections: dict[str, Any], problem: str, hill_and_forest: list[RunFolder], train_domain: Train, tmp_path: Path
) -> None:
    sections = {"training": {"max_steps": 2}, **sections}
    other = train_domain(tmp_path / "outputs", "lake", **sections)
    with pytest.raises(TrainingLensError, match=problem):
        combine([hill_and_forest[0], other], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_runs_of_two_bases_are_refused(
    hill_and_forest: list[RunFolder], train_domain: Train, tmp_path: Path, tiny_base: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights = {name: 1.01 * tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    other = train_domain(tmp_path / "outputs", "lake", model={"id": str(base)}, training={"max_steps": 2})
    with pytest.raises(AdapterError, match="have different weights"):
        combine([hill_and_forest[0], other], tmp_path / "both")


def test_a_run_is_not_combined_with_itself(hill_and_forest: list[RunFolder], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is given twice"):
        combine([hill_and_forest[0], hill_and_forest[0]], tmp_path / "both")


def test_its_model_card_says_how_it_was_made_and_names_no_folder(both: Combination) -> None:
    record = RunRecord(both.run)
    names = PathShortener(record)
    card = render_model_card(record, names, "me/both")
    assert "`training-lens combine --how cat` made it of 2 adapters" in card and "| hill | 0.9 |" in card
    assert "learning rate |" not in card and "Nothing was validated" not in card
    files = {file.path: file for file in build_metadata_files(record, names)}
    sent = files["training_lens/combination.json"].source
    assert isinstance(sent, bytes) and json.loads(sent)["how"] == "cat"
    assert str(both.run.root.parent).encode() not in sent and b"/hill" not in sent


def test_the_dashboard_and_lists_show_it(both: Combination) -> None:
    row = read_run_row(both.run)
    assert row.status == "finished"
    assert read_run(both.run).metrics["validation_loss"] == pytest.approx(evaluated_loss(both.run))
