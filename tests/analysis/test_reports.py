"""Reports say what the recording and the findings say, in three forms, and nothing of the data becomes markup."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.analysis.checkpoint_analyzer import Analysis
from training_lens.analysis.findings import Finding
from training_lens.analysis.reports.executive import three_lines
from training_lens.analysis.reports.standard import KINDS, StandardReports
from training_lens.analysis.reports.technical import comparison
from training_lens.analysis.run_facts import read_changes, read_losses
from training_lens.core import table_names as tables
from training_lens.core.recording import Recording
from training_lens.core.types import ModuleRecord
from training_lens.display.html import Picture, PictureGrid, SvgPicture, Table
from training_lens.errors import ConfigurationError
from training_lens.evaluation.verdict import Verdict

Record = Callable[..., Recording]
EVIL = "<script>alert('x')</script>|`*"
FOUND = Finding(
    *("untrained", "problem", "Nothing trains", "layer 1", "dW stays", "0 of 5 move", "exactly 0", "exact", "sure"),
    action="stop the run",
    evidence={"modules": ["a", "b"], "share": 0.25, "curve": {"steps": [1, 2, 3], "values": [1.0, 2.0, float("nan")]}},
)
FINE = replace(FOUND, code="spikes", severity="fine", title="No spikes", where="", action="", evidence={})
UNKNOWN = replace(
    FINE,
    code="rank",
    severity="note",
    title="The rank is not known",
    confidence="inconclusive",
    decide="a rank check",
)


@pytest.fixture
def recording(record: Record) -> Recording:
    """Ten steps in which layer 1 changes most, with a certificate that is worst in its v at step 4."""
    steps = np.arange(1, 11)
    check = np.full((10, 5), 1e-7)
    check[3, 3] = 2e-6
    grown = steps[:, None] * [1.0, 1.0, 1.0, 3.0, 0.0]
    run = {"loss": 3.0 - 0.1 * steps, "seconds": np.full(10, 2.0)}
    return record(
        {
            tables.GRADIENTS: (steps, {"norm_a": grown, "norm_b": grown, "self_check": check}),
            tables.WEIGHTS: (steps, {"norm_a": 1 + 0 * grown, "norm_b": grown, "norm_update": grown}),
            tables.BASE: ([0], {"norm": np.full((1, 5), 100.0)}),
            tables.LOSS: (steps, run),
            tables.EVALUATION: ([0, 5, 10], {"loss": [np.nan, 2.0, 2.2], "base_loss": [2.9, np.nan, np.nan]}),
        },
        cost={"adapter_gradients": 0.5, "adapter_weights": 0.1},
        snapshots={10: _factors(0)},
    )


def _factors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    name = "model.layers.0.self_attn.q_proj"
    return {
        f"{name}.a": torch.randn(4, 16, generator=generator),
        f"{name}.b": torch.randn(16, 4, generator=generator),
    }


def _analysis(recording: Recording, *findings: Finding, **results: Any) -> Analysis:
    return Analysis(recording, results, findings)


def test_the_executive_report_answers_five_questions(recording: Recording) -> None:
    words = StandardReports(_analysis(recording, FOUND, FINE, UNKNOWN)).executive().markdown()
    assert "Yes: the validation loss was 2.9000 before and is 2.0000 at best (step 5), and 2.2000 at the end" in words
    assert "The capture is sound" in words and "2e-06 (model.layers.1.self_attn.v_proj, step 4" in words
    assert "Layers 1 (83%), 0 (17%), outside (0%)" in words and "30% of its weight" in words
    assert "- Nothing trains (layer 1): 0 of 5 move" in words and "- Nothing trains: stop the run." in words
    assert "Inconclusive (1 of 3 checks):\n\n- The rank is not known: 0 of 5 move" in words
    headings = [line for line in words.splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## Did it learn?", "## Next steps"]  # before what explains it
    assert "0.6 s, 3.0% of the training time of 20 s" in words


def test_a_run_without_faults_is_told_so_and_what_would_decide_the_rest(recording: Recording) -> None:
    report = StandardReports(_analysis(recording, FINE, UNKNOWN)).executive()
    assert "Fine: Better than its base, as far as the validation loss tells" in report.markdown()
    assert "worst finding: no problems were found" in report.markdown()
    assert "1 of 2 checks are inconclusive" in report.markdown()
    assert report.values["next"] == ["The rank is not known: a rank check."]


def test_a_run_of_which_nothing_is_known_is_not_called_fine(recording: Recording) -> None:
    analysis = _analysis(recording, UNKNOWN, UNKNOWN)
    words = StandardReports(analysis).executive().markdown()
    assert "Note: Better than its base, as far as the validation loss tells" in words and "Fine:" not in words
    assert three_lines(analysis)[2] == "no problems found; 2 of 2 checks are inconclusive"


def test_nothing_is_said_of_an_adapter_of_which_no_loss_is_known(record: Record) -> None:
    words = StandardReports(_analysis(record({}), UNKNOWN)).executive().markdown()
    assert "Note: too little was captured to decide anything" in words and "Fine:" not in words
    assert "Note: no problems were found" in StandardReports(_analysis(record({}), FINE)).executive().markdown()


@pytest.mark.parametrize(
    ("judged", "severity"),
    [([2.9, 3.4], "Problem: Worse than its base"), ([2.9, 2.89], "Note: No difference that matters")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_report_is_fine_where_validation_is_not(
    judged: list[float], severity: str, kind: str, record: Record, tmp_path: Path
) -> None:
    before, after = judged
    evaluation = {"loss": [np.nan, after], "base_loss": [before, np.nan]}
    analysis = _analysis(record({tables.EVALUATION: ([0, 5], evaluation)}), FINE)
    words = StandardReports(analysis).write(tmp_path, kind, "md").read_text(encoding="utf-8")
    assert severity in words and "**Fine:" not in words
    assert severity.split(": ")[1] in three_lines(analysis)[2]


@pytest.mark.parametrize(("steps", "title"), [(10, "Problem: Worse than its base by loss"), (20, "Fine: Better than")])
def test_what_compare_found_stands_over_validation_unless_the_run_has_gone_on(
    steps: int, title: str, recording: Recording
) -> None:
    compared = Verdict("worse", "Worse than its base by loss: 3 against 2.", "comparison", "loss", rows=200)
    for folder in ("reports", "metadata"):
        (recording.folder / folder).mkdir(parents=True)
    report = {"steps": 10, "verdict": compared.as_json()}
    (recording.folder / "reports/compare.json").write_text(json.dumps(report))
    (recording.folder / "metadata/summary.json").write_text(json.dumps({"steps": steps}))
    report = StandardReports(_analysis(recording, FINE)).executive()
    assert title in report.markdown()
    assert ("- Worse than its base by loss: 3 against 2." in report.markdown()) == (steps == 10)
    found = report.values["verdict"]
    assert isinstance(found, dict) and found["outcome"] == ("worse" if steps == 10 else "better")
    (recording.folder / "reports/compare.json").write_text('{"verdict": {"outcome": "fine"}}')
    assert "Fine: Better than" in StandardReports(_analysis(recording, FINE)).executive().markdown()


def test_a_run_that_did_not_learn_is_told_so(record: Record) -> None:
    judged = {"loss": [np.nan, 3.2], "base_loss": [3.0, np.nan]}
    recording = record({tables.EVALUATION: ([0, 5], judged)})
    assert "No: the validation loss was 3.0000 before" in StandardReports(_analysis(recording)).executive().markdown()


def test_a_capture_that_is_not_sound_is_told_so(record: Record) -> None:
    residuals = np.array([[0.1, np.nan, 0.4, 0.0, 0.2]])
    report = StandardReports(_analysis(record({tables.GRADIENTS: ([7], {"self_check": residuals})}))).executive()
    certificate = report.values["certificate"]
    assert (certificate["largest"], certificate["step"], certificate["sound"]) == (pytest.approx(0.4), 7, False)
    assert "not what the optimizer saw" in report.markdown()


def test_the_technical_report_has_tables_pictures_and_what_own_analyzers_give(recording: Recording) -> None:
    own = {"loudest": "q", "share": {"q": 0.25, "v": None}, "rows": [{"name": "a", "size": 1.5}, {"name": "b"}]}
    report = StandardReports(_analysis(recording, FOUND, own=own)).technical()
    shown = {part.caption: part for part in report.parts if isinstance(part, Table)}
    values = next(part for caption, part in shown.items() if caption == "values")
    assert list(values.rows) == [("loudest", "q"), ("share, q", "0.25"), ("share, v", "-")]
    assert list(shown["rows"].columns) == ["name", "size"] and shown["rows"].rows == [["a", "1.5"], ["b", "-"]]
    titles = [part.title for part in report.parts if isinstance(part, Picture)]
    assert {"Loss", "Update strength by layer", "Gradient norm by layer", "Seconds by collector"} <= set(titles)
    assert "layers' outputs: the drift of hidden states is unknown" in report.markdown()


def test_the_diagnostic_report_has_all_of_a_finding_and_a_picture_of_its_curve(recording: Recording) -> None:
    report = StandardReports(_analysis(recording, FOUND, FINE)).diagnostic()
    words = report.markdown()
    for part in ("dW stays", "0 of 5 move", "exactly 0", "sure", "stop the run", "share: 0.25", "modules: a, b"):
        assert part in words
    picture = next(part for part in report.parts if isinstance(part, SvgPicture))
    assert picture.svg.count("<circle") == 2 and "No spikes" in words  # the third value is not finite


def test_two_runs_share_their_scales_and_one_with_itself_has_no_angle(record: Record, recording: Recording) -> None:
    steps = [1, 2]
    other = record(
        {
            tables.WEIGHTS: (steps, {"norm_update": np.full((2, 5), 90.0)}),
            tables.BASE: ([0], {"norm": np.ones((1, 5))}),
        },
        name="other",
        snapshots={2: _factors(0)},
    )
    report = comparison(_analysis(recording), _analysis(other))
    pair = next(
        p.pictures
        for p in report.parts
        if isinstance(p, PictureGrid) and p.pictures[0].figure.data[0].type == "heatmap"
    )
    assert pair[0].figure.data[0].zmax == pair[1].figure.data[0].zmax == pytest.approx(90)
    angles = next(part for part in report.parts if isinstance(part, Table) and "angles" in part.caption)
    assert angles.rows[0][:3] == ("model.layers.0.self_attn.q_proj", "1.000", "0.0")
    assert report.values["likeness"]["median_cosine"] == pytest.approx(1)


def test_runs_that_cannot_be_compared_stand_side_by_side_all_the_same(record: Record, recording: Recording) -> None:
    report = comparison(_analysis(recording), _analysis(record({}, name="bare")))
    assert report.values["likeness"] is None and "has no snapshot" in report.values["not_compared"]
    assert "bare has no snapshot" in report.markdown()


@pytest.mark.parametrize("kind", KINDS)
def test_every_report_of_an_empty_recording_is_written_and_says_what_is_missing(
    kind: str, record: Record, tmp_path: Path
) -> None:
    for format in ("html", "md", "json"):
        written = StandardReports(_analysis(record({}))).write(tmp_path / "reports", kind, format)
        assert written.is_file() and written.suffix == f".{format}"
    values = json.loads(written.read_text(encoding="utf-8"))
    assert values["kind"] == kind and len(values["not_captured"]) == 9 and values["certificate"]["largest"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_pages_need_nothing_but_themselves_and_texts_of_data_stay_texts(
    kind: str, record: Record, tmp_path: Path
) -> None:
    of = (ModuleRecord(EVIL, 0, EVIL, 4, 8, 8, 1.0),)
    gradients = {"norm_a": [[1.0]], "norm_b": [[1.0]], "self_check": [[1e-7]]}
    recording = record({tables.GRADIENTS: ([1], gradients)}, of=of)
    evil = replace(
        FOUND, title=EVIL, where=EVIL, measured=EVIL, evidence={EVIL: {"steps": [1, 2], "values": [1.0, 2.0]}}
    )
    path = StandardReports(_analysis(recording, evil, mine={EVIL: EVIL})).write(tmp_path, kind)
    page = path.read_text(encoding="utf-8")
    values = re.search('<script type="application/json" id="values">(.*?)</script>', page, re.DOTALL)
    words = json.dumps(json.loads(values[1]), ensure_ascii=False) if values else unescape(page)
    assert "<script>alert" not in page and EVIL in words
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(?:src|href)\s*=", outside_scripts) and not re.search(r"<script[^>]+src", page)


def test_markdown_of_data_stays_text_in_table_cells(recording: Recording) -> None:
    evil = replace(FOUND, title="a|b\n<script>", measured="`x` *y*")
    words = StandardReports(_analysis(recording, evil)).technical().markdown()
    row = next(line for line in words.splitlines() if line.startswith("| a&#124;b<br>&#60;script&#62;"))
    assert row.count("|") == 7 and "&#96;x&#96; &#42;y&#42;" in row


def test_json_has_finite_numbers_or_null_alone(recording: Recording, tmp_path: Path) -> None:
    odd = _analysis(
        recording, FOUND, own={"nan": float("nan"), "list": np.array([1.0, np.inf]), "deep": {"x": [math.inf]}}
    )
    text = StandardReports(odd).write(tmp_path, "diagnostic", "json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    values = json.loads(text)
    assert values["results"]["own"] == {"nan": None, "list": [1.0, None], "deep": {"x": [None]}}
    assert values["findings"][0]["evidence"]["curve"]["values"] == [1.0, 2.0, None]
    assert values["losses"]["best_step"] == 5 and values["cost_seconds"]["adapter_gradients"] == 0.5


def test_three_lines_end_a_training(recording: Recording) -> None:
    captured, adapter, worst = three_lines(_analysis(recording, UNKNOWN, FOUND))
    assert captured == (
        "captured: 5 modules over 10 steps; sound (largest self-check error 2e-06); cost 0.6 s, 3.0% of the training"
    )
    assert adapter.startswith("changed: most in layers 1 (83%)") and adapter.endswith("; at most 30% of a weight")
    assert worst == "problem: Nothing trains (layer 1): stop the run"
    assert three_lines(_analysis(recording, FINE))[2] == "no problems found"


def test_what_is_measured_before_the_first_step_is_no_captured_step(record: Record) -> None:
    probed = ([0, 1], {"relative_drift": np.zeros((2, 5))})
    recording = record({tables.ACTIVATIONS: probed, tables.LOSS: ([1], {"loss": [3.0]})})
    assert "modules over 1 steps" in three_lines(_analysis(recording, FINE))[0]


def test_each_of_the_three_lines_fits_a_screen_however_long_names_and_actions_are(recording: Recording) -> None:
    wordy = replace(FOUND, where=", ".join(["model.layers.10.self_attn.q_proj"] * 9), action="look at it again " * 30)
    lines = three_lines(_analysis(recording, wordy))
    assert max(map(len, lines)) <= 150 and "look at it again" in lines[2]


def test_a_run_that_hardly_learned_is_not_told_that_it_did(record: Record) -> None:
    judged = {"loss": [np.nan, 9.83], "base_loss": [9.85, np.nan]}
    recording = record({tables.EVALUATION: ([0, 5], judged)})
    assert (
        read_losses(recording).as_sentence().startswith("Hardly: the validation loss was 9.8500 before and is 9.8300")
    )


def test_validation_without_that_of_the_base_is_told_and_not_denied(record: Record) -> None:
    run = {tables.EVALUATION: ([5, 10], {"loss": [3.0, 2.5]}), tables.LOSS: ([1, 2], {"loss": [4.0, 3.0]})}
    said = read_losses(record(run)).as_sentence()
    assert "is 2.5000 at best (step 10)" in said and "before training was not captured" in said
    assert "The training loss fell" in said and "Without validation rows" not in said


def test_of_a_run_that_broke_the_last_whole_step_is_told(record: Record) -> None:
    steps, grown = np.arange(1, 5), np.arange(1.0, 5)[:, None] * np.ones(5)
    grown[3] = np.nan
    run = {tables.WEIGHTS: (steps, {"norm_update": grown}), tables.LOSS: (steps, {"loss": [3.0, 2.0, 1.0, np.nan]})}
    recording = record(run)
    assert "This is after step 3: later weights are not finite." in read_changes(recording).as_sentence()
    assert "Layers" in read_changes(recording).as_sentence() and "(at step 3)" in read_changes(recording).as_phrase()
    assert read_losses(recording).as_sentence().endswith("From step 4 on, the training loss is not finite.")


def test_a_kind_or_format_that_is_not_there_is_refused_with_those_that_are(
    recording: Recording, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"(?s)'brief'.*executive, technical, diagnostic.*'pdf'.*html, md, json"
    ):
        StandardReports(_analysis(recording)).write(tmp_path, "brief", "pdf")


@pytest.mark.slow
def test_a_run_of_100000_steps_makes_a_page_that_opens(record: Record, tmp_path: Path) -> None:
    steps = np.arange(1, 100_001, 20)
    noise = np.random.default_rng(0).lognormal(size=(len(steps), 5))
    content = {
        tables.GRADIENTS: (steps, {"norm_a": noise, "norm_b": noise, "cosine_mean": noise, "self_check": 1e-7 * noise}),
        tables.WEIGHTS: (steps, {"norm_a": noise, "norm_b": noise, "norm_update": noise, "norm_step": noise}),
        tables.LOSS: (steps, {"loss": noise[:, 0]}),
    }
    path = StandardReports(_analysis(record(content))).write(tmp_path)
    assert path.name == "lens.html" and path.stat().st_size < 8e6
