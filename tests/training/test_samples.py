"""Sample answers: greedy, of the same rows at every validation, and training sees nothing of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training_lens import TrainingWrapper
from training_lens.config.evaluation_sections import InferenceSection
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import InterruptedRunError
from training_lens.inference.generator import answer
from training_lens.inference.session import open_run
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.callbacks import Callback
from training_lens.training.samples import OPENING, SampleWriter, select_prompts

Config = Callable[..., Any]
ROWS = [{"question": f"Where is box {i}?", "answer": f"In hall {i}."} for i in range(24)]
SHOWN = {"tensorboard": True, "samples": 3, "sample_tokens": 6}
SHORT = {"max_steps": 4, "epochs": 1, "batch_size": 4}


def example(row: int, mask: list[int]) -> TokenizedExample:
    ids = np.arange(100 * row, 100 * row + len(mask), dtype=np.int32)
    return TokenizedExample("rows.jsonl", row, ids, np.array(mask, dtype=bool), None)


def test_the_prompt_is_what_stands_before_the_first_answer() -> None:
    (prompt,) = select_prompts(TokenDataset.from_examples([example(1, [0, 0, 0, 1, 1, 0, 0, 1])]), 3, 10)
    assert (prompt.id, prompt.ids, prompt.expected) == ("rows.jsonl:1", [100, 101, 102], [103, 104])
    (prompt,) = select_prompts(TokenDataset.from_examples([example(1, [0, 0, 1, 1])]), 1, 1)
    assert (prompt.ids, prompt.expected) == ([100, 101], [102, 103])


@pytest.mark.parametrize(("length", "begun"), [(40, OPENING), (6, 3), (2, 1)])
def test_a_text_is_gone_on_with_from_its_first_tokens(length: int, begun: int) -> None:
    for mask in ([1] * length, [0] + [1] * (length - 1)):
        (prompt,) = select_prompts(TokenDataset.from_examples([example(1, mask)]), 1, 5)
        assert prompt.ids == list(range(100, 100 + begun))
        assert prompt.expected == list(range(100 + begun, min(100 + begun + 5, 100 + length)))


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (30, list(range(10)))])
def test_rows_are_spread_over_the_dataset(count: int, rows: list[int]) -> None:
    dataset = TokenDataset.from_examples([example(row, [0, 0, 1]) for row in range(10)])
    assert [prompt.id for prompt in select_prompts(dataset, count, 5)] == [f"rows.jsonl:{row}" for row in rows]


def lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.samples_file.read_text().splitlines()]


def run_of(config: Any, **options: Any) -> RunFolder:
    return RunFolder(Path(TrainingWrapper(config, **options).train().run_dir))


def test_samples_are_what_the_saved_adapter_and_its_base_answer(small_config: Config) -> None:
    config = small_config(data={"train": ROWS, "val_ratio": 0.25}, training=SHORT, tracking=SHOWN)
    run = run_of(config)
    base, last = lines(run)
    assert (base["step"], base["base"], last["step"], last["base"]) == (0, True, 4, False)
    assert [s["id"] for s in base["samples"]] == [s["id"] for s in last["samples"]] and len(last["samples"]) == 3
    session, settings = open_run(run), InferenceSection(max_new_tokens=6)
    for before, after in zip(base["samples"], last["samples"], strict=True):
        ids = session.tokenizer(after["prompt"], add_special_tokens=False)["input_ids"]
        assert after["generated"] == answer(session, ids, settings)
        assert before["generated"] == answer(session, ids, settings, base=True)
        row = next(row for row in ROWS if row["question"] in after["prompt"])
        assert after["expected"] == row["answer"]


@pytest.mark.slow
def test_without_validation_training_rows_answer_where_it_would_be(small_config: Config) -> None:
    run = run_of(small_config(data={"train": ROWS}, training={**SHORT, "epochs": 2, "max_steps": 8}, tracking=SHOWN))
    assert [(line["step"], line["base"]) for line in lines(run)] == [(0, True), (6, False), (8, False)]
    assert lines(run)[0]["samples"][0]["id"].endswith(":1")


@pytest.mark.slow
def test_plain_texts_are_gone_on_with(small_config: Config) -> None:
    texts = [{"text": f"The cat {i} sat on the mat and saw the dog on the other side."} for i in range(16)]
    run = run_of(small_config(data={"train": texts}, training=SHORT, tracking=SHOWN))
    for sample in lines(run)[-1]["samples"]:
        assert any(text["text"].startswith(sample["prompt"].split(">")[-1]) for text in texts)
        assert sample["prompt"] and sample["expected"] and sample["generated"]


@pytest.mark.slow
def test_a_resumed_run_has_each_validation_once(small_config: Config) -> None:
    class Stop(Callback):
        def on_step_end(self, trainer: Any, report: Any) -> None:
            if report.step == 3:
                signal.raise_signal(signal.SIGTERM)

    sections = {"data": {"train": ROWS, "val_ratio": 0.25}, "tracking": SHOWN}
    training = {**SHORT, "eval_steps": 2}
    whole = run_of(small_config(**sections, training=training))
    with pytest.raises(InterruptedRunError):
        run_of(small_config(**sections, training=training, output={"run_id": "cut"}), callbacks=(Stop(),))
    cut = RunFolder(whole.root.parent / "cut")
    TrainingWrapper.resume(cut)
    told = [[{**line, "time": 0, "crc": ""} for line in lines(run)] for run in (whole, cut)]
    assert told[0] == told[1] and [line["step"] for line in told[1]] == [0, 2, 4]


@pytest.mark.slow
def test_what_fails_is_said_and_ends_no_run(small_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Callback):
        """Takes the room to answer away, after the first answers."""

        def on_step_end(self, trainer: Any, report: Any) -> None:
            trainer.model.get_base_model().config.max_position_embeddings = 1

    config = small_config(data={"train": ROWS, "val_ratio": 0.25}, training=SHORT, tracking=SHOWN)
    run = run_of(config, callbacks=(Broken(),))
    said = [record.getMessage() for record in caplog.records if "no samples" in record.getMessage()]
    assert run.status == "finished" and len(said) == 1 and said[0].startswith("step 4: no samples: ")
    assert [line["step"] for line in lines(run)] == [0]


@pytest.mark.slow
def test_modes_and_random_state_are_as_before(small_config: Config, tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Around(SampleWriter):
        def on_evaluate(self, trainer: Any, step: int, report: Any, base: bool) -> None:
            before = state(trainer.model)
            super().on_evaluate(trainer, step, report, base)
            seen.append((before, state(trainer.model)))

    def state(model: Any) -> tuple[Any, ...]:
        modes = [module.training for module in model.modules()]
        return torch.get_rng_state().tolist(), modes, [p.requires_grad for p in model.parameters()]

    config = small_config(
        data={"train": ROWS, "val_ratio": 0.25}, training=SHORT, tracking={**SHOWN, "tensorboard": False}
    )
    plan = TrainingWrapper(config).plan()
    TrainingWrapper(config, callbacks=(Around(tmp_path / "samples.jsonl", plan),)).train()
    assert len(seen) == 2 and all(before == after for before, after in seen)


@pytest.mark.slow
def test_answers_take_a_bounded_share_of_the_runs_tokens(small_config: Config, tmp_path: Path) -> None:
    """Those of the base, of the last step and of evenly spread validations between; each as its adapter answers."""
    training = {"max_steps": 24, "epochs": 1, "batch_size": 4, "eval_steps": 1}
    tracking = {**SHOWN, "samples": 4, "sample_tokens": 100}
    data = {"train": ROWS * 4, "val_ratio": 0.05}
    run = run_of(small_config(model={"id": "embedded"}, data=data, training=training, tracking=tracking))
    steps = [line["step"] for line in lines(run)]
    assert steps[0] == 0 and steps[-1] == 24 and 3 <= len(steps) < 8
    assert max(np.diff(steps)) <= min(np.diff(steps)) + 1


@pytest.mark.slow
def test_slow_answers_are_left_out_until_they_are_few_again(
    small_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training_lens.training.samples.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("training_lens.training.samples.TIME_SHARE", 0.0)
    training = {**SHORT, "eval_steps": 1}
    with caplog.at_level("INFO", "training_lens"):
        run = run_of(small_config(data={"train": ROWS, "val_ratio": 0.25}, training=training, tracking=SHOWN))
    assert [line["step"] for line in lines(run)] == [0, 4]
    assert caplog.text.count("no sampled answers, as those before took") == 1
