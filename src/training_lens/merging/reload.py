"""What a model computes for given tokens; run as a script, what a folder computes in a process of its own.

    python reload.py JOB.json

loads the job's folder as any program would, with nothing of this package (only torch, transformers and safetensors),
and writes logits.safetensors and greedy.json beside the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def last_logits(model: Any, ids: list[int], keep: int) -> Tensor:
    """Logits (at most `keep`, vocabulary) of the last positions, float32 on the CPU."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return logits[0, -keep:].float().cpu()  # (1, tokens, vocabulary) -> (positions, vocabulary)


def decode_greedily(model: Any, ids: list[int], limit: int, **stops: Any) -> tuple[list[int], list[float]]:
    """The tokens of the greedy answer, and for each the margin of its score over the second best token's."""
    prompt = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=limit,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **stops,
        )
    best = [step[0].float().topk(2).values.tolist() for step in out.scores]
    return out.sequences[0, len(ids) :].tolist(), [first - second for first, second in best]


def load_output(job: dict[str, Any]) -> Any:
    """The job's folder as a model in float32: a whole one, or `base` with the folder's delta or adapter."""
    import transformers

    found = getattr(transformers, job["class"])
    trusted = {"trust_remote_code": job["trust_remote_code"], "dtype": torch.float32}
    if job.get("is_adapter"):
        return load_adapted(job, found, trusted)
    if not job["base"]:
        return found.from_pretrained(job["folder"], **trusted).to(job["device"]).eval()
    model = found.from_pretrained(job["base"], revision=job["revision"], **trusted)
    if job["untied"]:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    weights = model.state_dict()
    for name, difference in load_delta(Path(job["folder"])).items():
        weights[name] += difference.float()
    return model.to(job["device"]).eval()


def load_adapted(job: dict[str, Any], found: Any, options: dict[str, Any]) -> Any:
    """`base`, quantized and resized as the job says, with the PEFT adapter in the job's folder."""
    from peft import PeftModel

    if job["quantization"]:
        options = options | {"quantization_config": job["quantization"], "device_map": {"": job["device"]}}
    model = found.from_pretrained(job["base"], revision=job["revision"], **options)
    if model.config.get_text_config().vocab_size != job["vocabulary"]:
        model.resize_token_embeddings(job["vocabulary"], mean_resizing=False)
    model = model if job["quantization"] else model.to(job["device"])
    return PeftModel.from_pretrained(model, job["folder"]).eval()


def load_delta(folder: Path) -> dict[str, Tensor]:
    """The differences in a folder that `merge --delta` wrote, by the names of the model's weights."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("delta*.safetensors")) for name, t in load_file(file).items()}


def run_job(path: Path) -> None:
    """Write the logits of the job's rows and the answers to its prompts."""
    from safetensors.torch import save_file

    job = json.loads(path.read_text(encoding="utf-8"))
    model = load_output(job)
    save_file(
        {str(i): last_logits(model, ids, job["keep"]).contiguous() for i, ids in enumerate(job["rows"])},
        path.with_name("logits.safetensors"),
    )
    stops = {"eos_token_id": job["stop_ids"], "pad_token_id": job["pad_id"]} if job["base"] else {}
    answers = [decode_greedily(model, ids, limit, **stops)[0] for ids, limit in job["prompts"]]
    path.with_name("greedy.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
