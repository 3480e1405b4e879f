"""How far rankings of training rows can be trusted: the linear datamodeling score of each method on two small runs.

    python benchmarks/explain/row_rankings.py [--folder FOLDER] [--seconds 280]

Each run is replayed 64 times without a random half of its rows. Predicted is minus the sum of the scores of the rows
that are left out, measured the change of the log-probability of 12 held-out answers; the score is Spearman's rank
correlation over the 64 replays, the mean over the answers with its standard error. Beside the method of `explain
answer` stand others that it could have: cosines and products of plain gradients, the product with the change of Adam's
update, cosines of hidden states, random scores. Writes benchmarks/results/explain_row_rankings.json. Runs
and pieces stay in FOLDER; a call that ran out of its seconds ends with exit code 75, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hidden_states import score_by_states
from machine import described
from pieces import Pieces

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.analysis.explanations.influence import read_gradient
from training_lens.data.source_reader import read_examples
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import tokenize
from training_lens.measures.row_influence import cosine_with, rank_correlation
from training_lens.models.model_classes import evaluation_mode
from training_lens.runs.run_folder import RunFolder
from training_lens.training.loop.checkpoint_manager import load_checkpoint
from training_lens.training.plan import build_preparation
from training_lens.training.row_ranking import LEFT_OUT, rank_rows, read_adam_direction
from training_lens.training.row_replay import RowReplay

RESULTS = Path("benchmarks/results/explain_row_rankings.json")
RUNS: dict[str, dict[str, Any]] = {
    "64 rows, 40 steps": {"data": {"max_examples": 64}, "training": {"max_steps": 40, "batch_size": 4, "seed": 1}},
    "80 rows, 40 steps": {"data": {"max_examples": 80}, "training": {"max_steps": 40, "batch_size": 4, "seed": 2}},
}
LONGEST_ROW = 175  # characters of a row in its file: a replay then takes seconds
SUBSETS, PIECE, QUERIES = 64, 8, 12
RANDOM = 50  # draws of random scores


def train(folder: Path, sections: dict[str, Any]) -> str:
    """The folder of a run of the embedded base on some of its rows, without validation."""
    values: dict[str, Any] = {
        "data": {"train": [str(write_short_rows(folder, embedded.TRAIN))], "validation": []},
        "training": {"precision": "fp32"},
        "tracking": {"tensorboard": False},
        "lens": {"report": False},
        "output": {"base_output_dir": str(folder)},
    }
    merged = {key: {**values.get(key, {}), **sections.get(key, {})} for key in {*values, *sections}}
    return TrainingWrapper(TrainingConfig.model_validate(merged)).train().run_dir


def write_short_rows(folder: Path, name: str) -> Path:
    """The short rows of a packaged split, as a file."""
    lines = embedded.PATHS[name].read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / f"{name.partition(':')[2]}.jsonl"
    path.write_text("".join(line for line in lines if len(line) <= LONGEST_ROW), encoding="utf-8")
    return path


def read_queries(replay: RowReplay, folder: Path) -> TokenDataset:
    """Held-out answers, evenly spread over the packaged rows."""
    config = replay.plan.config
    file = write_short_rows(folder, embedded.HELDOUT)
    examples = list(read_examples([str(file)], "data.validation", config.data))
    chosen = [examples[int(i)] for i in np.linspace(0, len(examples) - 1, QUERIES)]
    return TokenDataset.from_examples(
        [row for row in tokenize(chosen, build_preparation(config, replay.plan.tokenizer)) if row]
    )


def score_others(replay: RowReplay, queries: TokenDataset) -> dict[str, np.ndarray]:
    """The scores of the methods that `explain answer` does not have, (queries, rows) each."""
    rows, rates, precision = replay.training_rows, replay.read_rates(), replay.plan.precision
    names = ("cosine of gradients", "product of gradients", "product with the change of Adam's update")
    found = {name: np.zeros((len(queries), len(rows))) for name in names}
    with replay.open_trainer() as trainer:
        for step, folder in replay.states.items():
            load_checkpoint(folder, trainer.model, trainer.optimizer, trainer.scaler)
            direction = read_adam_direction(trainer)
            with evaluation_mode(trainer.model):
                of_queries = torch.stack([read_gradient(trainer.engine, query, precision) for query in queries])
                still = direction(torch.zeros_like(of_queries[0]))
                for row in range(len(rows)):
                    gradient = read_gradient(trainer.engine, rows[row], precision)
                    found[names[0]][:, row] += rates[step + 1] * cosine_with(of_queries, gradient).numpy()
                    found[names[1]][:, row] += rates[step + 1] * (of_queries @ gradient).numpy()
                    found[names[2]][:, row] += rates[step + 1] * (of_queries @ (direction(gradient) - still)).numpy()
    return found


def correlate(scores: np.ndarray, without: list[np.ndarray], measured: np.ndarray) -> dict[str, Any]:
    """The linear datamodeling score of scores (queries, rows): its mean over queries, standard error, and each."""
    predicted = np.stack([-scores[:, rows].sum(1) for rows in without])  # (subsets, queries)
    rhos = np.array([rank_correlation(p, m).rho for p, m in zip(predicted.T, measured.T, strict=True)])
    error = float(rhos.std(ddof=1) / np.sqrt(len(rhos)))
    return {"lds": float(rhos.mean()), "error": error, "queries": rhos.tolist()}


def measure(name: str, pieces: Pieces, folder: Path) -> dict[str, Any]:
    """The row of the table for one run."""
    run = RunFolder(Path(pieces.compute(f"{name}: run", lambda: train(folder, RUNS[name]))))
    replay = RowReplay(run)
    queries, count = read_queries(replay, folder), len(replay.training_rows)

    def score() -> dict[str, Any]:
        found = {"gradients": rank_rows(replay, queries).scores, **score_by_states(replay, queries)}
        return {method: scores.tolist() for method, scores in (found | score_others(replay, queries)).items()}

    scores = {method: np.array(values) for method, values in pieces.compute(f"{name}: scores", score).items()}
    without = [np.random.default_rng([7, i]).permutation(count)[: round(LEFT_OUT * count)] for i in range(SUBSETS)]
    changes: list[list[float]] = []
    for first in range(0, SUBSETS, PIECE):
        sets = without[first : first + PIECE]
        changes += pieces.compute(
            f"{name}: from {first}", lambda sets=sets: replay.measure(queries, sets).changes.tolist()
        )
    measured = np.array(changes)  # (subsets, queries)
    table = {method: correlate(values, without, measured) for method, values in scores.items() if method != "random"}
    generator = np.random.default_rng(0)
    draws = [correlate(generator.normal(size=(len(queries), count)), without, measured) for _ in range(RANDOM)]
    table["random"] = {key: np.mean([draw[key] for draw in draws], 0).tolist() for key in ("lds", "error", "queries")}
    return {
        "rows": count, "steps": replay.end, "states": list(replay.states), "queries": len(queries),
        "subsets": SUBSETS, "left_out": LEFT_OUT, "spread_of_changes_nats": float(measured.std(0).mean()),
        "methods": table,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/explain_row_rankings"))
    parser.add_argument("--seconds", type=float, default=280.0, help="after so many no further piece begins")
    args = parser.parse_args()
    pieces = Pieces(args.folder / "pieces.json", args.seconds)
    results: dict[str, Any] = {}
    for name in RUNS:  # what is measured stands, also where the time ends before the last run
        results[name] = measure(name, pieces, args.folder)
        RESULTS.write_text(json.dumps({"machine": described(), "runs": results}, indent=1) + "\n")
    for name, run in results.items():
        print(name)
        for method, score in sorted(run["methods"].items(), key=lambda item: -item[1]["lds"]):
            print(f"  {score['lds']:+.3f} +- {score['error']:.3f}  {method}")


if __name__ == "__main__":
    main()
