"""Answers with the prompts of other rows: the tokens are those of the rows, and the gain is a paired difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_lens.config.run_config import read_run_config
from training_lens.core.lens_store import LensStore
from training_lens.data.examples import TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, TokenSums, token_sums
from training_lens.inference.session import open_run
from training_lens.models.adapters import base_only
from training_lens.runs.run_folder import RunFolder
from training_lens.training.prompt_swaps import LEAST_ROWS, compare_losses, swap_prompts
from training_lens.training.run import TrainingWrapper


def example(row: int, prompt: list[int], answer: list[int], domain: str | None = None) -> TokenizedExample:
    mask = np.array([False] * len(prompt) + [True] * len(answer))
    return TokenizedExample("rows.jsonl", row, np.array([*prompt, *answer], dtype=np.int32), mask, domain)


def test_each_answer_gets_the_prompt_of_another_row_of_its_domain() -> None:
    rows = [example(i, [1, 10 + i], [20 + i, 2], "ab"[i % 2]) for i in range(4)]
    swapped = swap_prompts(TokenDataset.from_examples(rows), 8)
    assert swapped.positions.tolist() == [0, 1, 2, 3]
    found = [swapped.dataset[i] for i in range(4)]
    tokens = [row.input_ids.tolist() for row in found]
    assert tokens == [[1, 12, 20, 2], [1, 13, 21, 2], [1, 10, 22, 2], [1, 11, 23, 2]]
    assert all(row.loss_mask.tolist() == [False, False, True, True] for row in found)


def test_rows_without_one_answer_or_another_prompt_are_left_out() -> None:
    several = TokenizedExample("rows.jsonl", 1, np.arange(6, dtype=np.int32), np.array([0, 1, 0, 1, 1, 0], bool), None)
    text = TokenizedExample("rows.jsonl", 2, np.arange(4, dtype=np.int32), np.ones(4, bool), None)
    same = [example(i, [1, 10], [20 + i, 2]) for i in (3, 4)]
    long = [example(5, [1, 11], [20] * 9), example(6, list(range(30, 39)), [20, 2])]
    swapped = swap_prompts(TokenDataset.from_examples([several, text, *same, *long]), 8)
    assert swapped.positions.tolist() == [3, 5]  # row 4's place, and the short answer with a short prompt


def test_the_gain_is_a_ratio_of_sums_with_its_error() -> None:
    """Against 2,000 samples of rows: the stated error is the spread of the gain."""
    noise = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        tokens = noise.integers(5, 50, 32)
        own = noise.normal(2, 0.1, 32) * tokens
        other = own + noise.normal(0.3, 0.2, 32) * tokens
        found.append(compare_losses(own, TokenSums(other, tokens, tokens)))
    gains, errors = np.array(found).T
    assert gains.mean() == pytest.approx(0.3, abs=0.005) and errors.mean() == pytest.approx(gains.std(), rel=0.1)


def test_the_recorded_gains_are_those_of_the_saved_adapter_and_of_its_base(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    output = {"run_id": None, "base_output_dir": str(tmp_path)}
    plan = TrainingWrapper(read_run_config(finished_run).replace_keys(output=output)).plan()
    model = open_run(finished_run).model
    assert plan.validation is not None
    swapped = swap_prompts(plan.validation, LEAST_ROWS)  # of so short a run
    options = EvaluationOptions(plan.processes, "fp32", 4096, plan.tokenizer.eos_token_id)
    store = LensStore(finished_run.lens)
    for name, base in (("swap", False), ("base_swap", True)):
        with base_only(model, base):
            own = token_sums(model, plan.validation.select(swapped.positions), options).nll
            wanted = compare_losses(own, token_sums(model, swapped.dataset, options))
        for part, value in wanted._asdict().items():
            recorded = store.series("evaluation", f"{name}_{part}").values[-1, 0]
            assert recorded == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name}_{part}"
    assert store.series("evaluation", "swap_rows").values[-1, 0] == len(swapped.positions)


@pytest.mark.slow
def test_a_run_measures_its_last_adapter_and_changes_no_bit(small_config: Callable[..., Any]) -> None:
    def train(live: bool) -> RunFolder:
        config = small_config(lens={"live": live}, training={"epochs": 1, "batch_size": 8})
        return RunFolder(Path(TrainingWrapper(config).train().run_dir))

    run, other = train(True), train(False)
    weights = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (run, other)]
    assert weights[0] == weights[1]
    store = LensStore(run.lens)
    values = {name: float(store.series("evaluation", name).values[-1, 0]) for name in store.measures("evaluation")}
    assert values["swap_rows"] >= 8 and values["swap_error"] > 0 and np.isfinite(values["train_swap_gain"])
    assert "swap_gain" not in LensStore(other.lens).measures("evaluation")
