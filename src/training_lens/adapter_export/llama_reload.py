"""What llama.cpp computes from GGUF files; run as a script, in a process of its own.

    python llama_reload.py JOB.json

loads the job's model, with its adapter if it names one, with nothing of this package (only llama_cpp, numpy and
safetensors), and writes logits.safetensors and greedy.json beside the job, as `merging/reload.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def load_model(job: dict[str, Any]) -> Any:
    """The model with keys and values of attention in float32, which llama.cpp rounds to 16 bits otherwise."""
    import llama_cpp

    return llama_cpp.Llama(
        model_path=job["model"],
        lora_path=job["adapter"],
        n_ctx=job["positions"],
        n_batch=job["positions"],
        n_ubatch=job["positions"],
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def compute_logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits (tokens, vocabulary), float32."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def decode_greedily(model: Any, ids: list[int], limit: int, stop_ids: list[int]) -> list[int]:
    """The tokens of the greedy answer, with the stop token if one came."""
    model.reset()
    model.eval(ids)
    answer: list[int] = []
    while len(answer) < limit and (not answer or answer[-1] not in stop_ids):
        answer.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(answer[-1:])
    return answer


def run_job(path: Path) -> None:
    """Write the logits of the job's rows, the answers to its prompts, and the tokens of its texts."""
    from safetensors.numpy import save_file

    job = json.loads(path.read_text(encoding="utf-8"))
    model = load_model(job)
    logits = {str(i): compute_logits(model, ids)[-job["keep"] :] for i, ids in enumerate(job["rows"])}
    save_file(
        {name: np.ascontiguousarray(values) for name, values in logits.items()}, path.with_name("logits.safetensors")
    )
    answers = [decode_greedily(model, ids, limit, job["stop_ids"]) for ids, limit in job["prompts"]]
    path.with_name("greedy.json").write_text(json.dumps(answers), encoding="utf-8")
    texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
    path.with_name("tokens.json").write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
