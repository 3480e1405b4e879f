"""Cells are what they claim: so many tokens, sane times, a reason where there are none; the session stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.config.evaluation_sections import BenchmarkSection, InferenceSection
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.benchmark_page import build_table, list_skipped_cells, write_benchmark_page
from training_lens.inference.benchmark_run import Benchmark, Speed, Spread, TimedCall, run_benchmark
from training_lens.inference.decode_loop import Decoder
from training_lens.inference.generator import generate_answers, prepare_batch
from training_lens.inference.session import Session, open_run
from training_lens.runs.run_folder import RunFolder

SMALL = BenchmarkSection(batch_sizes=[1, 3], prompt_lengths=[7, 40], new_tokens=5, repetitions=3)


@pytest.fixture(scope="module")
def session(finished_run: RunFolder) -> Session:
    return open_run(finished_run)


@pytest.fixture(scope="module")
def report(session: Session) -> Benchmark:
    return run_benchmark(session, SMALL, Progress())


def logits(session: Session) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = session.model(input_ids=torch.arange(20, 60).view(2, 20)).logits
    return result


def test_every_cell_is_measured_and_its_numbers_agree(report: Benchmark) -> None:
    places = [(c.prompt_length, c.batch_size, c.model) for c in report.cells]
    assert places == [(n, b, m) for n in (7, 40) for b in (1, 3) for m in ("base", "adapter", "merged")]
    for cell in report.cells:
        speed = cell.speed
        assert speed is not None and cell.reason is None
        assert 0 < speed.first_token.mean < speed.latency.mean
        for spread in (speed.first_token, speed.token, speed.latency):
            assert 0 < spread.p50 <= spread.p95 <= spread.p99
        assert (speed.first_token.samples, speed.token.samples, speed.latency.samples) == (3, 3 * 4, 3)
        assert speed.tokens_per_second == pytest.approx(cell.batch_size * 5 / speed.latency.mean)
        assert speed.first_token.mean + 4 * speed.token.mean <= speed.latency.mean
        assert speed.peak_bytes is None or speed.peak_bytes > report.weights_bytes["adapter"]


def test_the_session_is_what_it_was(session: Session) -> None:
    before = logits(session)
    grads = [p.requires_grad for p in session.model.parameters()]
    run_benchmark(
        session, BenchmarkSection(batch_sizes=[2], prompt_lengths=[9], new_tokens=2, repetitions=1), Progress()
    )
    assert torch.equal(logits(session), before)
    assert [p.requires_grad for p in session.model.parameters()] == grads


def test_a_merged_model_weighs_what_the_base_does(report: Benchmark) -> None:
    assert report.weights_bytes["merged"] == report.weights_bytes["base"] < report.weights_bytes["adapter"]


def test_what_is_timed_is_what_infer_runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of `generate_answers`, though no token ends them, and not by the model's own `generate`."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the model's own generate")

    monkeypatch.setattr(session.model, "generate", refuse)
    prompts = [list(range(20 + i, 40 + i)) for i in range(3)]
    tokens: list[int] = []
    answers = prepare_batch(replace(session, stop_ids=frozenset()), prompts, 6, tokens.append)()
    settings = InferenceSection(max_new_tokens=6)
    for answer, expected in zip(answers, generate_answers(session, prompts, settings), strict=True):
        assert list(answer)[: len(expected.token_ids)] == list(expected.token_ids) and len(answer) == 6
    assert tokens == [answer[step] for step in range(6) for answer in answers]
    settings = SMALL.model_copy(update={"models": ["adapter"], "repetitions": 1})
    assert all(cell.speed for cell in run_benchmark(session, settings, Progress()).cells)


def test_prompts_are_of_the_rows(session: Session) -> None:
    settings = SMALL.model_copy(update={"models": ["adapter"], "repetitions": 1})
    assert run_benchmark(session, settings, Progress()).prompts == "the run's training rows"


def test_what_does_not_fit_has_a_reason_and_the_rest_goes_on(
    finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device where sixteen rows do not fit."""
    session = open_run(finished_run)
    compute = Decoder.compute_logits

    def compute_few(decoder: Decoder, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(ids) == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(decoder, ids, *rest)

    monkeypatch.setattr(Decoder, "compute_logits", compute_few)
    settings = BenchmarkSection(batch_sizes=[16, 1], prompt_lengths=[9, 510], new_tokens=4, repetitions=1)
    report = run_benchmark(session, settings, Progress())
    reasons = {(c.model, c.prompt_length, c.batch_size): c.reason for c in report.cells}
    assert {key for key, reason in reasons.items() if reason is None} == {
        (model, 9, 1) for model in ("base", "adapter", "merged")
    }
    assert list_skipped_cells(report) == [
        "not measured: base, adapter, merged with prompt 9, batch 16: out of memory: CUDA out of memory. Tried to "
        "allocate 2.00 GiB.",
        *(
            f"not measured: base, adapter, merged with prompt 510, batch {rows}: 510 + 4 tokens do not fit the model's "
            "512 positions"
            for rows in (16, 1)
        ),
    ]
    assert len(build_table(report).rows) == 3


def test_random_tokens_stand_in_for_rows_that_are_gone_and_it_is_said(
    small_config: Callable[..., Any],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from training_lens import TrainingWrapper

    rows = write_rows([{"question": f"Where is box {i}?", "answer": f"In hall {i}."} for i in range(8)])
    config = small_config(data={"train": [str(rows)], "max_examples": None}, training={"max_steps": 1})
    run = RunFolder(Path(TrainingWrapper(config).train().run_dir))
    rows.unlink()
    settings = BenchmarkSection(models=["adapter"], batch_sizes=[1], prompt_lengths=[9], new_tokens=2, repetitions=1)
    report = run_benchmark(open_run(run), settings, Progress())
    assert report.prompts.startswith("random tokens (") and report.cells[0].speed is not None
    assert sum("the prompts are random tokens" in r.getMessage() for r in caplog.records) == 1


def test_the_measures_are_those_of_the_calls() -> None:
    calls = [TimedCall((0.5, 0.6, 0.8), 1.0, 100), TimedCall((0.25, 0.35, 0.45), 0.5, 300)]
    speed = Speed.from_calls(calls, batch_size=4)
    assert speed.first_token.mean == pytest.approx(0.375)
    assert speed.token.mean == pytest.approx((0.1 + 0.2 + 0.1 + 0.1) / 4) and speed.token.samples == 4
    assert speed.tokens_per_second == pytest.approx(4 * 6 / 1.5)
    assert speed.peak_bytes == 300


def test_percentiles_are_numpys() -> None:
    samples = [float(i) for i in range(101)]
    assert asdict(Spread.from_samples(samples)) == {"mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "samples": 101}
    assert Spread.from_samples([1.0, 2.0]).p99 == pytest.approx(np.percentile([1.0, 2.0], 99)) == pytest.approx(1.99)


def test_json_and_page_hold_every_number(report: Benchmark, tmp_path: Path) -> None:
    value = json.loads(json.dumps(report.as_json()))
    assert value["settings"]["batch_sizes"] == [1, 3] and len(value["cells"]) == 12
    assert value["cells"][0]["speed"]["latency"]["samples"] == 3 and "linearly" in value["method"]
    write_benchmark_page(tmp_path / "page.html", report)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<tr><td>(?:base|adapter|merged)</td>", text)) == 12
    assert text.count("<svg") == text.count(">merged</text>") == 8 and text.count("<h2>Prompts of 40 tokens</h2>") == 1
    assert len(text) < 100_000 and "<script" not in text


@pytest.mark.parametrize(
    "keys", [{"batch_sizes": [2, 2]}, {"prompt_lengths": []}, {"new_tokens": 1}, {"models": ["x"]}]
)
def test_settings_that_measure_nothing_new_are_refused(small_config: Callable[..., Any], keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"benchmark.{next(iter(keys))}"):
        small_config(benchmark=keys)
