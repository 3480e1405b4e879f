"""What mlx-lm computes with an adapter; run as a script, in a process of its own.

    python mlx_reload.py JOB.json

loads the job's base with its adapter, with nothing of this package (only mlx, mlx_lm and numpy), on the CPU in float32,
and writes logits.safetensors and greedy.json beside the job, as `merging/reload.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def compute_logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits (tokens, vocabulary), float32."""
    import mlx.core as mx

    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def decode_greedily(model: Any, ids: list[int], limit: int, stop_ids: list[int]) -> list[int]:
    """The tokens of the greedy answer, with the stop token if one came; each from all tokens before it."""
    answer: list[int] = []
    while len(answer) < limit and (not answer or answer[-1] not in stop_ids):
        answer.append(int(np.argmax(compute_logits(model, [*ids, *answer])[-1])))
    return answer


def run_job(path: Path) -> None:
    """Write the logits of the job's rows and the answers to its prompts."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_adapters, load_model
    from safetensors.numpy import save_file

    mx.set_default_device(mx.cpu)
    job = json.loads(path.read_text(encoding="utf-8"))
    model, _ = load_model(Path(job["model"]))
    model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
    load_adapters(model, job["adapter"]).eval()
    logits = {str(i): compute_logits(model, ids)[-job["keep"] :] for i, ids in enumerate(job["rows"])}
    save_file(
        {name: np.ascontiguousarray(values) for name, values in logits.items()},
        path.with_name("logits.safetensors"),
    )
    answers = [decode_greedily(model, ids, limit, job["stop_ids"]) for ids, limit in job["prompts"]]
    path.with_name("greedy.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
