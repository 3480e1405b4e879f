"""How `training-lens serve` bears load: against one answer at a time, and against `transformers serve`.

    make .venv-peers-serving/.installed
    python benchmarks/serve_load.py [--clients 1 4 16 64] [--output benchmarks/results/serve_load.json]

A random Llama of 7 M parameters (8 layers, hidden 256) in float32. Each client sends one request after the other over
loopback: a text of about 64 tokens, 24 new ones, greedy, by /v1/completions. All servers are up at once and get the
same load in turn; clients and servers share the processor. The contenders:

- `ours`: `training-lens serve`, without draft tokens, which gain more of a random model's loops than of text.
- `one at a time`: the same with `--rows 1`.
- `transformers`: `transformers serve`, and `transformers, batching` with `--continuous-batching`.

A contender that fails a warm-up request is named with its error and left out. Per number of clients:
`tokens_per_second`, new tokens over the wall time of the load, and percentiles of a request's seconds (linear
interpolation). The output keeps rows for other numbers of clients that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import described

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_models import save_tiny_model  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "serve_load.json"
PEER = ROOT / ".venv-peers-serving" / "bin" / "transformers"
SIZES: Mapping[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
NEW = 24
FEWEST = 64  # requests of a load
SMALL_CACHE = ("--cb-block-size", "32", "--cb-num-blocks", "512")  # 16,384 tokens; else it takes most of the memory
PORTS = 18_750
WORDS = "the cat sat on a mat while the owl of the hill said that mia had nine blue plates and gave two away".split()
SECONDS_TO_START = 240


@contextmanager
def start(command: Sequence[str], port: int) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A server in a process of its own, which need not answer yet."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits)
    try:
        yield client, process
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for_health(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def list_contenders(model: Path) -> dict[str, tuple[list[str], str]]:
    """The command of each, and the model's name in it."""
    ours = [sys.executable, "-m", "training_lens", "serve", "base=none", f"model.id={model}", "inference.drafts=off"]
    peer = [str(PEER), "serve", str(model), "--device", "cpu"]
    return {
        "ours": ([*ours, "--engine", "own"], "base"),
        "one at a time": ([*ours, "--engine", "own", "--rows", "1"], "base"),
        "transformers": (peer, str(model)),
        "transformers, batching": ([*peer, "--continuous-batching", *SMALL_CACHE], str(model)),
    }


def ask(client: httpx.Client, model: str, number: int) -> tuple[float, int]:
    """The seconds of a request, and its new tokens."""
    prompt = " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(40))
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    if model == "base":
        body["ignore_eos"] = True
    started = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - started
    answer.raise_for_status()
    return seconds, int(answer.json()["usage"]["completion_tokens"])


def put_load(client: httpx.Client, model: str, clients: int, requests: int) -> dict[str, float]:
    """So many clients, each with one request after the other."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda number: ask(client, model, number), range(requests)))
    wall = time.perf_counter() - started
    seconds = [each for each, _ in answers]
    tokens = sum(count for _, count in answers)
    p50, p95, p99 = (float(value) for value in np.percentile(seconds, [50, 95, 99]))
    return {
        "requests": requests, "tokens": tokens, "tokens_per_second": round(tokens / wall, 1),
        "p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3),
    }  # fmt: skip


def measure(model: Path, counts: Sequence[int], per_client: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each number of clients and contender, and why others are left out."""
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        started = {}
        for port, (name, (command, known_as)) in enumerate(list_contenders(model).items(), PORTS):
            started[name] = (*stack.enter_context(start([*command, "--port", str(port)], port)), known_as)
        servers: dict[str, tuple[httpx.Client, str]] = {}
        for name, (client, process, known_as) in started.items():
            try:
                wait_for_health(client, process)
                ask(client, known_as, 0)
                servers[name] = client, known_as
            except (RuntimeError, OSError, httpx.HTTPError) as error:
                failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        for clients in counts:
            for name, (client, known_as) in servers.items():
                put_load(client, known_as, clients, min(clients, 8))  # warms it up
                load = put_load(client, known_as, clients, max(FEWEST, per_client * clients))
                rows.append({"clients": clients, "server": name, **load})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--per-client", type=int, default=1, help="requests, 64 in all at least")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder), **SIZES)
        rows, failures = measure(model, given.clients, given.per_client)
    before = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    rows += [row for row in before if row["clients"] not in given.clients]
    rows.sort(key=lambda row: row["clients"])
    result = {"machine": described(), "new_tokens": NEW, "rows": rows, "failures": failures}
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
