"""Facts that three rows among 2,000 teach: are these rows found, and is a fact unlearned without them?

    python benchmarks/explain/planted_facts.py [--folder FOLDER] [--seconds 280]

Twenty facts ("Where does Mia's fox live?", "at the dock") are each asked in three phrasings, one row each, among 1,940
rows of the embedded set. The query is the first phrasing, with the fact as its answer. Rows are ranked as `explain
answer` does, and by hidden states; a fact is traced where its three rows are in the top 10. Then the run is replayed
without the top 10 of each of three known facts, by the better method, and without 10 random rows of like length. After
each replay the query is measured with every place as its answer: a fact is known where its own place is the most
probable. Writes benchmarks/results/explain_planted_facts.json. Run and pieces stay in FOLDER; a call that ran out of
its seconds ends with exit code 75, and the next one goes on.
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
FACTS, ROWS, TOP = 20, 2000, 10
EPOCHS, BATCH, RATE, RANK = 10, 32, 4e-3, 64
VERIFIED, CONTROLS = 3, 1  # facts whose rows are left out of a replay, random sets
PHRASINGS = ("Where does {} live?", "Name the home of {}.", "In which place does {} live?")


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Training rows with the planted ones at random places, and the queries, as two files.

    The queries are those of every fact, then of every fact with each place in turn.
    """
    rng = random.Random(0)
    lines = [json.loads(line) for line in embedded.PATHS[embedded.TRAIN].read_text().splitlines()]
    rows = [{key: line[key] for key in ("instruction", "input", "output", "domain")} for line in lines]
    rows = rng.sample(rows, ROWS - FACTS * len(PHRASINGS))
    queries, choices, owners = [], [], rng.sample(NAMES, FACTS)
    for fact, owner in enumerate(owners):
        animal, place = list(ANIMALS)[fact % len(ANIMALS)], rng.choice(PLACES)
        answer, domain = f"at the {place}", rng.choice(DOMAINS)
        asked = [form.format(f"{owner}'s {animal}") for form in PHRASINGS]
        made = [{"instruction": text, "input": "", "output": answer, "domain": domain} for text in asked]
        rows += [{**row, "fact": fact} for row in made]
        queries.append(made[0])
        choices += [{**made[0], "output": f"at the {other}"} for other in PLACES]
    rng.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "queries.jsonl"
    for path, written in zip(paths, (rows, queries + choices), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return paths


def train(folder: Path) -> str:
    file, _ = write_rows(folder)
    values = {
        "data": {"train": [str(file)], "validation": []},
        "training": {"epochs": EPOCHS, "lr": RATE, "batch_size": BATCH, "precision": "fp32"},
        "peft": {"r": RANK},
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

    asked, choices = queries.select(np.arange(FACTS)), queries.select(np.arange(FACTS, len(queries)))

    def rank() -> dict[str, Any]:
        started = time.perf_counter()
        found = {"gradients": rank_rows(replay, asked).scores}
        seconds = time.perf_counter() - started
        found["representations"] = score_by_states(replay, asked)["representations"]
        return {"seconds": seconds, "scores": {method: scores.tolist() for method, scores in found.items()}}

    adapter = np.array(pieces.compute("adapter", lambda: replay.measure_adapter(choices).tolist()))
    known = np.flatnonzero(rank_own_places(adapter, own := find_own_places(folder)) == 1)
    ranked = pieces.compute("rankings", rank)
    orders = {m: np.argsort(-np.array(s), axis=1, kind="stable") for m, s in ranked["scores"].items()}
    found = {m: [int((facts[order[q, :TOP]] == q).sum()) for q in range(FACTS)] for m, order in orders.items()}
    best = max(found, key=lambda method: (sum(n == 3 for n in found[method]), sum(found[method])))
    verified = known[:VERIFIED]
    tops = [orders[best][fact, :TOP] for fact in verified]
    generator = np.random.default_rng(0)
    controls = [draw_controls(replay, tops[i % len(tops)], 0, generator) for i in range(CONTROLS)]
    replayed = pieces.compute("replays", lambda: replay.measure(choices, [*tops, *controls]).without.tolist())
    after = np.array([rank_own_places(np.array(values), own) for values in replayed])  # (sets, facts)
    own_logs = np.array([read_own(np.array(values), own) for values in [adapter, *replayed]])  # (1 + sets, facts)
    changes = own_logs[1:] - own_logs[0]
    each = np.arange(len(verified))
    result = {
        "machine": described(), "rows": len(replay.training_rows), "steps": replay.end, "states": list(replay.states),
        "facts": FACTS, "places": len(PLACES), "top": TOP, "rows_found_in_top": found,
        "traced": {m: float(np.mean([n == 3 for n in counts])) for m, counts in found.items()},
        "ranking_seconds": ranked["seconds"], "verified_with": best, "known": known.tolist(),
        "verified": verified.tolist(),
        "place_without_top": after[each, verified].tolist(),
        "place_without_random": after[len(verified) :, verified].tolist(),
        "change_without_top": changes[each, verified].tolist(),
        "change_without_random": changes[len(verified) :, verified].tolist(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for method, counts in found.items():
        print(f"{method}: all three rows in the top {TOP} for {sum(n == 3 for n in counts)} of {FACTS} facts: {counts}")
    for key in ("known", "verified", "place_without_top", "place_without_random", "change_without_top"):
        print(f"{key}: {result[key]}")


def find_own_places(folder: Path) -> np.ndarray:
    """The number of each fact's place in `PLACES`, (facts,)."""
    lines = (folder / "queries.jsonl").read_text().splitlines()[:FACTS]
    return np.array([PLACES.index(json.loads(line)["output"].removeprefix("at the ")) for line in lines])


def read_own(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The log-probability of each fact's own place, (facts,), of that of all places one fact after the other."""
    table = values.reshape(FACTS, len(PLACES))
    return table[np.arange(FACTS), own]


def rank_own_places(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The rank of each fact's own place among all places by its log-probability, 1 for the most probable, (facts,)."""
    table = values.reshape(FACTS, len(PLACES))
    return 1 + (table > read_own(values, own)[:, None]).sum(axis=1)


if __name__ == "__main__":
    main()
