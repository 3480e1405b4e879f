"""Whether `training-lens serve` stays as it is over many requests: memory, speed and answers.

    python benchmarks/serve_soak.py [--requests 20000] [--output benchmarks/results/serve_soak.json]

A tiny random Llama with two adapters (LoRA and DoRA, one step each). Sixteen clients send requests one after the
other: chats and texts for base and adapters, greedy and sampled, whole and streamed, with `n`, stop strings,
log-probabilities, domains and scales; one in twenty is malformed, and one in twenty hangs up in the middle of its
stream. After each quarter: the server's resident memory, its open files, the requests by status, and the rows that it
still decodes when all is quiet. One greedy chat of each model is asked before and after, and must have the same answer.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from machine import described
from serve_load import wait_for_health

from training_lens import TrainingConfig, TrainingWrapper, embedded

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_models import save_tiny_model  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "serve_soak.json"
ADAPTERS: Mapping[str, Mapping[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}
MODELS = (*ADAPTERS, "base")
WORDS = "owl hill what is 3 plus 4? Mia plates".split()
CLIENTS, QUARTERS, PORT = 16, 4, 18_790


def train_adapters(folder: Path) -> None:
    base = save_tiny_model(folder / "base", vocab_size=1024, initializer_range=0.3, max_position_embeddings=512)
    lines = embedded.PATHS[embedded.TRAIN].read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(line for line in lines if len(line) < 240)[:8000].rpartition("\n")[0])
    for name, peft in ADAPTERS.items():
        values = {
            "model": {"id": str(base)},
            "data": {"train": [str(folder / "rows.jsonl")], "max_examples": 16},
            "training": {"epochs": 1, "batch_size": 16, "lr": 5e-2},
            "peft": {"r": 4, **peft},
            "lens": {"enabled": False},
            "tracking": {"tensorboard": False, "samples": 0, "histograms_every": None},
            "output": {"base_output_dir": str(folder / "outputs"), "experiment_name": name},
        }
        TrainingWrapper(TrainingConfig.model_validate(values)).train()


def write_body(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """The route and the body of a request."""
    prompt = " ".join(
        draw.choices(["owl", "hill", "what", "is", "3", "plus", "4?", "Mia", "plates"], k=draw.randint(1, 30))
    )
    body: dict[str, Any] = {"model": draw.choice(MODELS), "max_tokens": draw.randint(1, 12)}
    if draw.random() < 0.5:
        body |= {"temperature": 1.0, "seed": draw.randint(0, 99), "n": draw.randint(1, 3)}
    if draw.random() < 0.2:
        body |= {"stop": ["a", "the"]}
    if draw.random() < 0.2 and body["model"] != "base":
        body |= {"adapter_scale": draw.choice([0, 0.5, 1.0])}
    body |= {"stream": draw.random() < 0.4}
    if draw.random() < 0.05:
        body |= draw.choice([{"model": "none"}, {"temperature": 9}, {"max_tokens": -1}, {"typo": 1}])
    if draw.random() < 0.3:
        return "/v1/completions", body | {"prompt": prompt, "logprobs": 1}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}], "domain": "lake"}


def send_request(client: httpx.Client, number: int) -> str:
    """Its status, or "hung up"."""
    draw = random.Random(number)
    route, body = write_body(draw)
    if draw.random() < 0.05:
        with client.stream(
            "POST", route, json=body | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        ) as stream:
            for _ in zip(range(3), stream.iter_lines(), strict=False):
                pass
        return "hung up"
    return str(client.post(route, json=body).status_code)


def read_answers(client: httpx.Client) -> list[str]:
    """A greedy answer of each model."""
    bodies = [{"model": name, "messages": [{"role": "user", "content": "What is 3 plus 4?"}]} for name in MODELS]
    answers = [client.post("/v1/chat/completions", json=body | {"max_tokens": 24}).json() for body in bodies]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


def read_metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def put_load(client: httpx.Client, requests: int) -> list[dict[str, Any]]:
    """A row for each quarter of the requests."""
    rows = []
    for quarter in range(QUARTERS):
        numbers = range(quarter * requests // QUARTERS, (quarter + 1) * requests // QUARTERS)
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            statuses = Counter(pool.map(lambda number: send_request(client, number), numbers))
        seconds = time.perf_counter() - started
        time.sleep(1)
        metrics = read_metrics(client)
        rows.append(
            {
                "requests": len(numbers),
                "seconds": round(seconds, 1),
                "statuses": dict(sorted(statuses.items())),
                "resident_mb": round(metrics["process_resident_memory_bytes"] / 2**20, 1),
                "open_files": int(metrics["process_open_fds"]),
                "rows_left": int(metrics["training_lens_rows"] + metrics["training_lens_waiting_rows"]),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train_adapters(Path(folder))
        place = [f"output.base_output_dir={folder}/outputs", "--base-name", "base", "--port", str(PORT)]
        command = [sys.executable, "-m", "training_lens", "serve", *ADAPTERS, *place, "--engine", "own"]
        with (Path(folder) / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
            client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120, limits=limits)
            wait_for_health(client, process)
            before = read_answers(client)
            rows = put_load(client, given.requests)
            same = read_answers(client) == before
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    result = {"machine": described(), "rows": rows, "same_answers": same, "exit_code": process.returncode}
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
