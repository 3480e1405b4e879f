"""What transformers 4.57, and PEFT where it is importable, compute from folders: run by the Python of `make compat`.

    python read.py JOBS.json

Each job names a `base` and perhaps an `adapter`, tokens `ids`, and the file of logits that are `wanted`. Printed is one
JSON object a line, of the job's name: the largest difference of logits, or the error; and warnings of unknown keys.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NEAR = 1e-3  # a larger difference is tried again with plain attention: some soft caps and biases need that in 4.57


def load(job: dict[str, Any], **options: Any) -> Any:
    """The job's model, in float32."""
    model = AutoModelForCausalLM.from_pretrained(job["base"], torch_dtype=torch.float32, **options)
    if job.get("adapter"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    else:
        AutoTokenizer.from_pretrained(job["base"])
    return model.eval()


@torch.no_grad()
def measure(job: dict[str, Any]) -> dict[str, Any]:
    """How far the job's model is from what is wanted."""
    wanted = load_file(job["wanted"])[job["tensor"]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = difference(load(job), job["ids"], wanted)
        if found > NEAR:
            with contextlib.suppress(ValueError):  # a class that has no plain attention says so
                found = min(found, difference(load(job, attn_implementation="eager"), job["ids"], wanted))
    unknown = sorted({str(w.message)[:200] for w in caught if "keyword arguments" in str(w.message)})
    return {"difference": found, "spread": float(wanted.std()), "unknown_keys": unknown}


def difference(model: Any, ids: list[int], wanted: torch.Tensor) -> float:
    """The largest difference of the logits."""
    return float((model(input_ids=torch.tensor([ids])).logits - wanted).abs().max())


def main(path: Path) -> None:
    """Do the jobs, each on its own."""
    logging.disable(logging.WARNING)
    for job in json.loads(path.read_text(encoding="utf-8")):
        try:
            result = measure(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(json.dumps({"name": job["name"], **result}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
