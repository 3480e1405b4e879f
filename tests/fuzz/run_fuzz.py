"""`make fuzz`: many cases of every subject, counted by what became of them, as a table for docs/reliability.md.

python tests/fuzz/run_fuzz.py CASES [FIRST_SEED]
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz_cases import SUBJECTS, World, run_case, study_config
from fuzz_sandbox import BAD, Outcome

WHOLE_COMMANDS = ("run folders", "mirrors", "studies")  # of half a second each; all others take some milliseconds
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz table: written by make fuzz -->", "<!-- end of the fuzz table -->"
COLUMNS = ("result", "clear error", *BAD)


def make_world(folder: Path) -> World:
    """A run of a few steps, with lens and checkpoints, and its mirror. What cases need is imported with it."""
    import torch
    from tiny_models import save_tiny_model

    from training_lens import TrainingConfig, TrainingWrapper
    from training_lens.analysis import StandardReports  # noqa: F401  # forked processes have it
    from training_lens.config.compose import compose

    compose([], ["training.lr=1e-3"], None, None)  # what is made once in a process is made here, for all
    torch.set_num_threads(1)  # a process that is forked beside threads of ours would wait for them
    values = {
        "model": {"id": str(save_tiny_model(folder / "base", vocab_size=1024))},
        "data": {"max_examples": 16, **write_first_rows(folder, 32)},
        "training": {"max_steps": 2, "warmup_ratio": 0, "batch_size": 4},
        "tracking": {"tensorboard": False, "samples": 1},
        "output": {"base_output_dir": str(folder / "outputs"), "mirror": str(folder / "mirror")},
    }
    run = Path(TrainingWrapper(TrainingConfig.model_validate(values)).train().run_dir)
    sweep, prepared = _make_study(folder / "sweep"), _prepare(folder)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all that it looks at
    return World(run, folder / "mirror", sweep, prepared)


def write_first_rows(folder: Path, count: int) -> dict[str, list[str]]:
    """The first rows of the embedded set, as a config's data section."""
    from training_lens import embedded

    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for split, name in (("train", embedded.TRAIN), ("validation", embedded.HELDOUT)):
        lines = embedded.PATHS[name].read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
        rows[split] = [str(folder / f"{split}.jsonl")]
    return rows


def _make_study(folder: Path) -> Path:
    """A sweep's folder with trials of each kind, none of which was trained."""
    from optuna.trial import TrialState

    from training_lens.sweeps.space import Space
    from training_lens.sweeps.study import SharedStudy
    from training_lens.sweeps.worker import Worker

    folder.mkdir()
    config = study_config()
    opened = SharedStudy(config, Space.from_config(config), folder, {}, {"peft.r": 4, "training.lr": 1e-3})
    with Worker(folder / "workers") as worker:
        for number in range(4):
            trial = opened.claim_trial(worker)
            assert trial is not None
            opened.report_loss(trial, 1, 2.0 - number)
            opened.keep_losses(trial, [1.0, 2.0 - number, 3.0])
            opened.end_trial(trial, TrialState.COMPLETE, 2.0 - number, seconds=1.0, run_dir="runs/x")
        failed, released = opened.claim_trial(worker), opened.claim_trial(worker)
        assert failed is not None and released is not None
        opened.end_trial(failed, TrialState.FAIL, error="out of memory")
        opened.release_trial(released)
    opened.close()
    return folder


def _prepare(folder: Path) -> Path:
    from training_lens import TrainingConfig
    from training_lens.display.progress import Progress
    from training_lens.preparation.prepare_splits import prepare_splits

    rows = [{"question": f"Where is box {i}?", "answer": f"In the hall {i}."} for i in range(20)]
    values = {
        "data": {"train": rows},
        "prepare": {"output": str(folder / "prepared"), "splits": {"train": 0.8, "validation": 0.2}},
        "output": {"base_output_dir": str(folder / "outputs")},
    }
    return prepare_splits(TrainingConfig.model_validate(values), Progress()).folder


def run_cases(world: World, cases: int, first: int, place: Path) -> Iterator[tuple[str, int, Outcome]]:
    """Subject, seed and outcome of each case, the subjects in turn; of ten turns, whole commands take part in one."""
    turns = [name for turn in range(10) for name in SUBJECTS if name not in WHOLE_COMMANDS or turn == 0]
    for number in range(cases):
        subject, seed = turns[number % len(turns)], first + number
        yield subject, seed, run_case(world, subject, seed, place / f"case-{number}")


def table(counts: dict[str, Counter[str]], slowest: float, peak: int) -> str:
    """What became of the cases, in Markdown."""
    lines = [f"| subject | cases | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for subject, found in counts.items():
        cells = [f"{found[column]:,}" for column in COLUMNS]
        lines.append(f"| {subject} | {found.total():,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The slowest case took {slowest:.1f} s, the largest {peak / 2**20:,.0f} MiB."])


def main(cases: int, first: int = 0) -> int:
    counts: dict[str, Counter[str]] = {subject: Counter() for subject in SUBJECTS}
    slowest, peak, bad = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        world = make_world(Path(place) / "world")
        for subject, seed, outcome in run_cases(world, cases, first, Path(place)):
            counts[subject][outcome.kind] += 1
            slowest, peak = max(slowest, outcome.seconds), max(peak, outcome.peak_bytes)
            if outcome.kind in BAD:
                bad += 1
                print(f"{subject}, seed {seed}: {outcome.kind} after {outcome.seconds:.1f} s\n{outcome.told[-1500:]}\n")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written = f"{BEGIN}\n\n{table(counts, slowest, peak)}\n\n{END}"
    PAGE.write_text(before + written + rest.partition(END)[2], encoding="utf-8")
    print(table(counts, slowest, peak))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
