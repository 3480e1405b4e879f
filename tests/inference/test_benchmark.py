"""Cells are what they claim: so many tokens, sane times, a reason where there are none; the session stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens.config.evaluation_sections import BenchmarkSection
from training_lens.display.progress import Progress
from training_lens.errors import ConfigurationError
from training_lens.inference.benchmark_page import build_table, list_skipped_cells, write_benchmark_page
from training_lens.inference.benchmark_run import Benchmark, Speed, Spread, TimedCall, run_benchmark
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


def watch(session: Session, monkeypatch: pytest.MonkeyPatch, fail_from: int = 10**6) -> list[torch.Tensor]:
    """Notes what the adapter's `generate` gives; as on a device where batches of `fail_from` rows do not fit."""
    generate, seen = session.model.generate, []

    def noted(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(input_ids) >= fail_from:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append(generate(input_ids=input_ids, **options))
        return seen[-1]

    monkeypatch.setattr(session.model, "generate", noted)
    return seen


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


def test_prompts_are_of_the_rows_and_answers_of_one_length(
    finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly so many tokens, though the model would end before; the same prompts for the same seed."""
    session = open_run(finished_run)
    everything_ends = list(range(session.model.config.vocab_size))
    session.model.generation_config.eos_token_id = everything_ends
    seen = watch(session, monkeypatch)
    settings = SMALL.model_copy(update={"models": ["adapter"], "repetitions": 1})
    report = run_benchmark(session, settings, Progress())
    assert [tuple(out.shape) for out in seen] == [(1, 12)] * 2 + [(3, 12)] * 2 + [(1, 45)] * 2 + [(3, 45)] * 2
    assert report.prompts == "the run's training rows"
    assert "<|assistant|>" in session.tokenizer.decode(seen[-1][:, :40].flatten().tolist())
    again = watch(session, monkeypatch)
    run_benchmark(session, settings, Progress())
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=False))


def test_what_does_not_fit_has_a_reason_and_the_rest_goes_on(
    finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_run(finished_run)
    watch(session, monkeypatch, fail_from=2)
    settings = BenchmarkSection(batch_sizes=[2, 1], prompt_lengths=[9, 510], new_tokens=4, repetitions=1)
    report = run_benchmark(session, settings, Progress())
    reasons = {(c.model, c.prompt_length, c.batch_size): c.reason for c in report.cells}
    assert {key for key, reason in reasons.items() if reason is None} == {
        ("base", 9, 2), ("merged", 9, 2), ("base", 9, 1), ("adapter", 9, 1), ("merged", 9, 1),
    }  # fmt: skip
    assert list_skipped_cells(report) == [
        "not measured: adapter with prompt 9, batch 2: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "not measured: base, adapter, merged with prompt 510, batch 2: 510 + 4 tokens do not fit the model's 512 "
        "positions",
        "not measured: base, adapter, merged with prompt 510, batch 1: 510 + 4 tokens do not fit the model's 512 "
        "positions",
    ]
    assert len(build_table(report).rows) == 5


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
    assert text.count("Plotly.newPlot") == 4 and text.count('"name":"merged, prompt 40"') == 4


@pytest.mark.parametrize(
    "keys", [{"batch_sizes": [2, 2]}, {"prompt_lengths": []}, {"new_tokens": 1}, {"models": ["x"]}]
)
def test_settings_that_measure_nothing_new_are_refused(small_config: Callable[..., Any], keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"benchmark.{next(iter(keys))}"):
        small_config(benchmark=keys)
