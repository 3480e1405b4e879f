"""Reading, tokenizing and caching rows: ours against the maps of TRL's SFTTrainer, and how ours grows with the rows.

    make peers                                                                  (once)
    python benchmarks/prepare_speed.py [--repeats 3] [--grow 1000 10000 100000 1000000]

GSM8K and T0 rows with the tokenizer of Phi-3, at most 1,024 tokens an example. Ours reads the files as they are, and
renders them; TRL is given one file of rendered prompts and completions, and its reading is timed apart. Each
preparation has a process of its own, then another one takes the result from the cache: ours hashes the files, opens
the cache, reads all lengths, supervised counts, domains and files, and counts duplicates; TRL's maps find their caches.
Written: seconds (median), tokens per second, peak memory of the process, ratios of TRL's seconds to ours. `--grow`
repeats GSM8K rows, each with a number of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from machine import described
from train_ours import TEMPLATE
from training_jobs import HERE, python_of, read_pairs, write_pairs

SEQ_LEN = 1024
GSM8K, T0 = "data/gsm8k/train.jsonl", "data/t0_per_template/*.jsonl"
PROMPT = TEMPLATE.replace("\\n", "\n").removesuffix("{output}")
END = "<|endoftext|>"  # at the end of T0's completions, where ours takes it off; TRL puts its own
TRL = {"trl": 1, "trl_2_processes": 2}


def prepare(files: list[str], tokenizer_folder: str, cache: str) -> dict[str, Any]:
    """Prepare once in this process, or take it from the cache; imports and the tokenizer's loading are not timed."""
    from training_lens.config.data_sections import DataSection
    from training_lens.config.schema import ModelSection
    from training_lens.data.templates import build_renderer
    from training_lens.data.token_cache import prepare_split
    from training_lens.data.token_pipeline import Preparation, tokenizer_hash
    from training_lens.data.tokenization import TextEncoder
    from training_lens.display.progress import Progress
    from training_lens.models.factory import load_tokenizer
    from training_lens.training.plan_rows import count_duplicates
    from training_lens.utils.devices import peak_bytes

    tokenizer = load_tokenizer(ModelSection(), tokenizer_folder)
    started = time.perf_counter()
    data = DataSection(template=TEMPLATE)
    renderer = build_renderer(data, tokenizer)
    ready = Preparation(data, renderer, TextEncoder(tokenizer), SEQ_LEN, tokenizer_hash(tokenizer))
    split = prepare_split(files, "data.train", ready, Path(cache), Progress())
    train = split.dataset
    count_duplicates(train, None)
    tokens, _ = int(train.lengths.sum()), (train.supervised_counts, train.domains, train.files)
    seconds = time.perf_counter() - started
    import torch

    return {"seconds": seconds, "tokens": tokens, "rows": len(train), "peak_bytes": peak_bytes(torch.device("cpu"))}


def in_a_process(call: list[str]) -> dict[str, Any]:
    """The JSON line that a command prints last."""
    said = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout
    measured: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return measured


def twice(call: list[str]) -> dict[str, Any]:
    """What the command measures first, and how long it takes from its cache."""
    first = in_a_process(call)
    return {**first, "again_seconds": in_a_process(call)["seconds"]}


def ours(files: list[str], tokenizer: Path, cache: Path) -> dict[str, Any]:
    return twice([sys.executable, __file__, "--one", str(tokenizer), str(cache), *files])


def trl(rows: Path, tokenizer: Path, cache: Path, processes: int) -> dict[str, Any]:
    call = [str(python_of("trl")), str(HERE / "peers/prepare_trl.py"), str(rows), str(tokenizer), str(cache)]
    return twice([*call, str(processes)])


def compared(shared: Path, tokenizer: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Both on GSM8K and T0, in turn."""
    pairs = [pair for source in (GSM8K, T0) for pair in read_pairs(str(shared / source), 10**9)]
    rows = folder / "rows.jsonl"
    write_pairs([(PROMPT.format(instruction=a), b.removesuffix(END)) for a, b in pairs], rows)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *TRL)}
    for turn in range(repeats):
        found["ours"].append(ours([str(shared / GSM8K), str(shared / T0)], tokenizer, folder / f"ours-{turn}"))
        for name, processes in TRL.items():
            found[name].append(trl(rows, tokenizer, folder / f"{name}-{turn}", processes))
    medians = {name: _median(results) for name, results in found.items()}
    ratios = {name: round(medians[name]["seconds"] / medians["ours"]["seconds"], 2) for name in TRL}
    return {**medians, "speed_of_ours": ratios}


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the results, and tokens per second."""
    medians = {key: round(statistics.median(result[key] for result in results), 3) for key in results[0]}
    rates = {
        "tokens_per_second": int(medians["tokens"] / medians["seconds"]),
        "again_seconds_per_million_tokens": round(medians["again_seconds"] / medians["tokens"] * 1e6, 4),
    }
    return {**medians, **rates}


def grown(sizes: list[int], shared: Path, tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """Ours at each number of rows."""
    pairs, points = read_pairs(str(shared / GSM8K), 10**9), []
    for size in sizes:
        path = folder / "grown.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number, (prompt, completion) in enumerate(islice(cycle(pairs), size)):
                file.write(json.dumps({"prompt": f"{number}. {prompt}", "completion": completion}) + "\n")
        points.append({**_median([ours([str(path)], tokenizer, folder / f"cache-{size}")])})
        print(json.dumps(points[-1]), file=sys.stderr)
    return points


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(prepare(sys.argv[4:], sys.argv[2], sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="0: only --grow")
    parser.add_argument("--grow", type=int, nargs="*", default=[], help="numbers of rows")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prepare_speed.json"))
    args = parser.parse_args()
    tokenizer, results = args.shared.resolve() / "tokenizers/phi3", dict[str, Any]()
    if args.output.is_file():
        results = json.loads(args.output.read_text())
    results["machine"] = described()
    with tempfile.TemporaryDirectory() as name:
        if args.repeats:
            results["gsm8k_and_t0"] = compared(args.shared.resolve(), tokenizer, Path(name), args.repeats)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
        if args.grow:
            results["growth"] = grown(args.grow, args.shared.resolve(), tokenizer, Path(name))
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
