"""What an adapter remembers: canaries that it learned, rows that it repeats, and what cannot be measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.analysis.explanations.memory_measurement import (
    CHOSEN,
    TRAINED,
    UNSEEN,
    MemoryOptions,
    explain_memory,
)
from training_lens.analysis.explanations.memory_report import build_memory_report, describe_memory
from training_lens.data.examples import Message, TokenizedExample
from training_lens.data.token_dataset import TokenDataset
from training_lens.errors import ConfigurationError
from training_lens.evaluation.evaluator import EvaluationOptions, find_greedy_matches
from training_lens.inference.session import open_run
from training_lens.measures.exposure import count_leading
from training_lens.runs.run_folder import RunFolder
from training_lens.utils.processes import Processes

Config = Callable[..., TrainingConfig]
COLOURS = ("red", "blue", "green", "black", "white", "yellow")


@pytest.fixture(scope="module")
def run(small_config_in: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A few rows and canaries, visited so often that the frequent ones are memorized. For reading alone."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": f"What has box {i}?", "answer": COLOURS[i % 6]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config_in(
        folder / "outputs",
        data={"train": [str(folder / "rows.jsonl")], "val_ratio": 0.25, "canaries": 2, "canary_repeats": [1, 24]},
        training={"epochs": 5, "lr": 1e-2},
        peft={"r": 16},
        lens={"collectors": ["adapter_weights"], "probe_tokens": 0},
    )
    return RunFolder(Path(TrainingWrapper(config).train().run_dir))


@pytest.mark.slow
def test_a_canary_seen_often_ranks_first_and_one_never_planted_does_not(run: RunFolder, tmp_path: Path) -> None:
    said: list[str] = []
    row = run.read_metadata("data.json")["train"]["files"]
    source = next(iter(row))
    held = set(run.read_metadata("held_out.json"))
    chosen = next(f"{source}:{n}" for n in range(1, 25) if f"{source}:{n}" not in held)
    found = explain_memory(run, MemoryOptions(candidates=64, samples=8, rows=(chosen,)), announce=said.append)
    by_repeats = found.list_repeats()
    assert sorted(by_repeats) == [0, 1, 24] and by_repeats[24] == [6.0, 6.0]
    assert max(by_repeats[0]) < 6.0 and found.chance == pytest.approx(math.log2(math.e), abs=0.1)
    assert {row.group for row in found.continuations} == {TRAINED, UNSEEN, CHOSEN} and len(said) == 1
    assert any(
        "24 times an epoch: mean exposure 6.00 of 6.00 bits, above chance" in line for line in describe_memory(found)
    )
    build_memory_report(found).write(tmp_path, "html")


@pytest.mark.slow
def test_what_greedy_decoding_wrote_matches_whole_and_up_to_a_change(run: RunFolder) -> None:
    session = open_run(run)
    prompt = torch.tensor([session.prompt_ids([Message("user", "What has box 3?")])], device=session.device)
    ids = session.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].numpy()
    mask = np.arange(len(ids)) >= prompt.shape[1]
    changed = np.where(np.arange(len(ids)) == prompt.shape[1] + 4, (ids + 1) % 50, ids)
    examples = [TokenizedExample("x", n, np.int32(row), mask, None) for n, row in enumerate((ids, changed))]
    options = EvaluationOptions(Processes(session.device), session.precision, 1000, session.pad_id)
    whole, cut = find_greedy_matches(session.model, TokenDataset.from_examples(examples), options)
    assert whole.all() and len(whole) == 6 and count_leading(cut) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (MemoryOptions(candidates=2), "--candidates 2: give 16"),
        (MemoryOptions(samples=-1), "--samples -1"),
        (MemoryOptions(rows=("rows.jsonl:99",)), "'rows.jsonl:99' is none of the 18 rows"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: RunFolder, options: MemoryOptions, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        explain_memory(run, options)
    assert said in str(caught.value)
