"""Wrong answers planted among the training rows: does the score of `explain rows` find them?

    python benchmarks/explain/wrong_answers.py demo|gsm8k [--epochs 3] [--seeds 1] [--folder FOLDER] [--output FILE]

5 % of the rows get the answer of another row; in the embedded set, of one of the same domain and kind, so that form and
domain fit and only the content is wrong. A run trains on them as it comes, recording the losses of its rows. Written
are the area under the ROC curve of each score (chance is 0.5), the share of the planted rows among as many rows of the
highest score, and the same of the list of the command. The scores that the command does not use are those that it was
chosen from.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import described

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.analysis.explanations.row_explanation import SUSPICIOUS, RowVisits, read_visits
from training_lens.measures.row_life import describe_lives, score_wrong_answers
from training_lens.runs.run_folder import RunFolder

SHARE = 0.05
ROWS = {"demo": 500, "gsm8k": 400}  # so many of them: a run then takes minutes on two cores
SHARED = Path(__file__).parents[3] / "shared"


def read_rows(name: str) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]], str]:
    """The rows, the group of each within which answers are swapped, and the key of the answer."""
    if name == "demo":
        lines = [json.loads(line) for line in embedded.PATHS[embedded.TRAIN].read_text().splitlines()[: ROWS[name]]]
        groups = [(line["domain"], line["skill"]) for line in lines]
        return [{k: line[k] for k in ("instruction", "input", "output", "domain")} for line in lines], groups, "output"
    lines = [json.loads(line) for line in (SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()[: ROWS[name]]]
    return lines, [()] * len(lines), "answer"


def plant(name: str, seed: int, path: Path) -> set[int]:
    """Write the rows with some answers swapped; the numbers of those rows, from 1."""
    rows, groups, key = read_rows(name)
    generator = random.Random(seed)
    chosen = generator.sample(range(len(rows)), round(SHARE * len(rows)))
    answers = [row[key] for row in rows]
    planted = set()
    for place in chosen:
        others = [i for i, group in enumerate(groups) if group == groups[place] and answers[i] != answers[place]]
        if others:
            rows[place][key] = answers[generator.choice(others)]
            planted.add(place + 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return planted


def train(name: str, path: Path, seed: int, epochs: float, folder: Path) -> RunFolder:
    """The run, which is resumed where an earlier call of this script was stopped."""
    run = RunFolder(folder / "experiments/default/runs" / f"seed-{seed}")
    if run.root.is_dir():
        return run if run.status == "finished" else RunFolder(Path(TrainingWrapper.resume(run).run_dir))
    values: dict[str, Any] = {
        "data": {"train": [str(path)]},
        "training": {"epochs": epochs, "seed": seed},
        "lens": {"report": False, "live": False, "collectors": ["adapter_weights"], "probe_tokens": 0},
        "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
        "output": {"base_output_dir": str(folder), "run_id": f"seed-{seed}"},
    }
    if name == "gsm8k":
        values["model"] = {"id": str(SHARED / "models/tinystories-656k"), "seq_len": 512}
    return RunFolder(Path(TrainingWrapper(TrainingConfig.model_validate(values)).train().run_dir))


def measure_auroc(scores: np.ndarray, is_planted: np.ndarray) -> float:
    """The chance that a planted row scores higher than another one; ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    hits = int(is_planted.sum())
    return float((ranks[is_planted].sum() - hits * (hits + 1) / 2) / (hits * (len(scores) - hits)))


def list_scores(visits: RowVisits) -> dict[str, np.ndarray]:
    lives = describe_lives(visits.losses, 0.5)
    later = np.nanmean(visits.losses[:, 1:], 1) if visits.losses.shape[1] > 1 else visits.losses[:, 0]
    return {
        "score of the command": score_wrong_answers(visits.losses, visits.steps, visits.tokens),
        "mean loss after the first visit": later,
        "mean loss": -lives.log_probability,
        "first loss": lives.first_loss,
        "last loss": lives.last_loss,
        "low confidence": -lives.confidence,
        "low variability": -np.nan_to_num(lives.variability),
        "total loss after the first visit": later * visits.tokens,
        "last over first loss": lives.last_loss / lives.first_loss,
    }


def measure(name: str, seed: int, epochs: float, folder: Path) -> dict[str, Any]:
    folder = folder / f"{name}-{epochs:g}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{seed}.jsonl"
    planted = plant(name, seed, path)
    visits = read_visits(train(name, path, seed, epochs, folder / "outputs"))
    numbers = np.array([int(row_id.rpartition(":")[2]) for row_id in visits.ids])
    is_planted = np.isin(numbers, list(planted))
    scores = list_scores(visits)
    order = np.argsort(-scores["score of the command"], kind="stable")
    listed = scores["score of the command"] >= SUSPICIOUS
    return {
        "seed": seed,
        "rows": len(numbers),
        "planted": int(is_planted.sum()),
        "visits": int(visits.losses.shape[1]),
        "auroc": {key: round(measure_auroc(values, is_planted), 4) for key, values in scores.items()},
        "found_among_as_many": round(float(is_planted[order[: is_planted.sum()]].mean()), 4),
        "listed": int(listed.sum()),
        "listed_and_planted": int((listed & is_planted).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", choices=["demo", "gsm8k"])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="of the runs; a script that was stopped goes on where it was")
    options = parser.parse_args()
    output = options.output or Path(f"benchmarks/results/explain_wrong_answers_{options.rows}.json")
    known = json.loads(output.read_text()) if output.is_file() else {"machine": described(), "runs": []}
    folder = options.folder or Path(tempfile.mkdtemp())
    done = {(run["epochs"], run["seed"]) for run in known["runs"]}
    for seed in range(options.seeds):
        if (options.epochs, seed) not in done:
            known["runs"].append({"epochs": options.epochs, **measure(options.rows, seed, options.epochs, folder)})
            output.write_text(json.dumps(known, indent=1) + "\n")
            print(json.dumps(known["runs"][-1], indent=1))


if __name__ == "__main__":
    main()
