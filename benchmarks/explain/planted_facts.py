"""Facts that three rows among 300 teach: are these rows found, and is a fact unlearned without them?

    python benchmarks/explain/planted_facts.py [--folder FOLDER] [--seconds 280]

Twenty facts ("Where does Mia's fox live?", "at the dock") are each asked in three phrasings, one row each, among 240
rows of the embedded set. The query is a fourth phrasing, with the fact as its answer. Rows are ranked as `explain
answer` does, and by hidden states; a fact is traced where its three rows are in the top 10. Then the run is replayed
without the top 10 of six facts each, by the better method, and without 10 random rows of like length, and the facts'
log-probabilities are measured after each. Writes benchmarks/results/explain_planted_facts.json. Run and pieces stay in
FOLDER; a call that ran out of its seconds ends with exit code 75, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from hidden_states import score_by_states
from machine import described
from pieces import Pieces
from small_world import ANIMALS, DOMAINS, NAMES, PLACES

from training_lens import TrainingConfig, TrainingWrapper, embedded
from training_lens.data.source_reader import read_examples
from training_lens.data.token_dataset import TokenDataset
from training_lens.data.token_pipeline import tokenize
from training_lens.runs.run_folder import RunFolder
from training_lens.training.plan import build_preparation
from training_lens.training.row_ranking import draw_controls, rank_rows
from training_lens.training.row_replay import RowReplay

RESULTS = Path("benchmarks/results/explain_planted_facts.json")
FACTS, ROWS, TOP = 20, 300, 10
VERIFIED, CONTROLS, PIECE = 6, 3, 3  # facts whose rows are left out of a replay, random sets, sets in one piece
PHRASINGS = ("Where does {} live?", "Name the home of {}.", "In which place does {} live?")
ASKED = "Tell me where {} lives."


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Training rows with the planted ones at random places, and the queries, as two files."""
    rng = random.Random(0)
    lines = [json.loads(line) for line in embedded.PATHS[embedded.TRAIN].read_text().splitlines()]
    rows = [{key: line[key] for key in ("instruction", "input", "output", "domain")} for line in lines]
    rows = rng.sample(rows, ROWS - FACTS * len(PHRASINGS))
    queries, owners = [], rng.sample(NAMES, FACTS)
    for fact, owner in enumerate(owners):
        animal, place = list(ANIMALS)[fact % len(ANIMALS)], rng.choice(PLACES)
        answer, domain = f"at the {place}", rng.choice(DOMAINS)
        asked = [form.format(f"{owner}'s {animal}") for form in (*PHRASINGS, ASKED)]
        made = [{"instruction": text, "input": "", "output": answer, "domain": domain} for text in asked]
        rows += [{**row, "fact": fact} for row in made[:-1]]
        queries.append(made[-1])
    rng.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "queries.jsonl"
    for path, written in zip(paths, (rows, queries), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return paths


def train(folder: Path) -> str:
    file, _ = write_rows(folder)
    values = {
        "data": {"train": [str(file)], "validation": []},
        "training": {"epochs": 2, "precision": "fp32"},
        "tracking": {"tensorboard": False},
        "lens": {"report": False},
        "output": {"base_output_dir": str(folder / "outputs")},
    }
    return TrainingWrapper(TrainingConfig.model_validate(values)).train().run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/explain_planted_facts"))
    parser.add_argument("--seconds", type=float, default=280.0, help="after so many no further piece begins")
    args = parser.parse_args()
    folder = args.folder.absolute()
    pieces = Pieces(folder / "pieces.json", args.seconds)
    run = RunFolder(Path(pieces.compute("run", lambda: train(folder))))
    replay = RowReplay(run)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    number_of = replay.training_rows.row_numbers - 1
    facts = np.array([lines[number].get("fact", -1) for number in number_of])  # (rows,): which fact, or -1
    config = replay.plan.config
    examples = list(read_examples([str(folder / "queries.jsonl")], "data.validation", config.data))
    queries = TokenDataset.from_examples(
        [t for t in tokenize(examples, build_preparation(config, replay.plan.tokenizer)) if t]
    )

    def rank() -> dict[str, Any]:
        started = time.perf_counter()
        found = {"gradients": rank_rows(replay, queries).scores}
        seconds = time.perf_counter() - started
        found["representations"] = score_by_states(replay, queries)["representations"]
        return {"seconds": seconds, "scores": {method: scores.tolist() for method, scores in found.items()}}

    base = np.array(pieces.compute("base", lambda: replay.measure_base(queries).tolist()))
    ranked = pieces.compute("rankings", rank)
    orders = {m: np.argsort(-np.array(s), axis=1, kind="stable") for m, s in ranked["scores"].items()}
    found = {m: [int((facts[order[q, :TOP]] == q).sum()) for q in range(FACTS)] for m, order in orders.items()}
    best = max(found, key=lambda method: (sum(n == 3 for n in found[method]), sum(found[method])))
    tops = [orders[best][q, :TOP] for q in range(VERIFIED)]
    generator = np.random.default_rng(0)
    controls = [draw_controls(replay, tops[q], 0, generator) for q in range(CONTROLS)]
    sets, changes, whole = [*tops, *controls], [], None
    for first in range(0, len(sets), PIECE):
        part = sets[first : first + PIECE]

        def replay_part(part: list[np.ndarray] = part) -> dict[str, Any]:
            result = replay.measure(queries, part)
            return {"whole": result.whole.tolist(), "changes": result.changes.tolist()}

        values = pieces.compute(f"without sets from {first}", replay_part)
        whole, changes = values["whole"], changes + values["changes"]
    measured, whole = np.array(changes), np.array(whole)
    own = measured[np.arange(VERIFIED), np.arange(VERIFIED)]
    random_rows = measured[VERIFIED:, :VERIFIED]  # (controls, facts)
    learned = (whole - base)[:VERIFIED]
    result = {
        "machine": described(), "rows": len(replay.training_rows), "steps": replay.end, "states": list(replay.states),
        "facts": FACTS, "top": TOP, "rows_found_in_top": found,
        "traced": {m: float(np.mean([n == 3 for n in counts])) for m, counts in found.items()},
        "ranking_seconds": ranked["seconds"], "verified_with": best,
        "log_probability": {"base": base.tolist(), "adapter": whole.tolist()},
        "change_without_top": own.tolist(), "change_without_random": random_rows.tolist(),
        "unlearned_share": (-own / learned).tolist(),
        "unlearned_share_random": (-random_rows / learned).mean(0).tolist(),
        "below_every_random": float((own < random_rows.min(0)).mean()),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for method, counts in found.items():
        print(f"{method}: all three rows in the top {TOP} for {sum(n == 3 for n in counts)} of {FACTS} facts: {counts}")
    print(
        f"learned {learned.mean():.2f} nats; without the top {TOP} {own.mean():+.2f}, random {random_rows.mean():+.2f}"
    )
    print(f"below every random set: {result['below_every_random']:.0%}")


if __name__ == "__main__":
    main()
