"""A trained language model of 51 M parameters, made from one of 0.7 M by a widening that keeps what it computes.

    python benchmarks/widened_model.py FOLDER [--source ../shared/models/tinystories-656k]

As Net2Net does (Chen, Goodfellow and Shlens 2015, arXiv 1511.05641): units are copied, and the weights that read
copies are divided by their number. So `WIDER` copies of each hidden unit, attention head and MLP unit give the same
logits:

- RMSNorm: the mean square over copies is that over the units, so its weight is copied.
- Attention: heads are copied whole and keep their size, so rotary embedding and scale stay. The copies follow each
  other in turn, so that query head h reads the same key-value head as before.
- Output: the embedding is tied and reads copies, too, so the last norm's weight is divided.

Between the layers come further ones that add nothing: what they write, `o_proj` and `down_proj`, is 0, and the rest is
drawn. The logits are compared with the source's before noise is added to each matrix: then copies differ, and every
parameter takes part. Printed: parameters, the largest difference of logits, and the loss of the source, and of the
widened model before and after the noise, on text that the source samples, which is saved beside the model as
`stories.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDER = 6  # copies of each unit: 128 -> 768 hidden units
EMPTY_LAYERS = (2, 3)  # added after each layer of the source
NOISE = 0.1  # standard deviation, relative to the root mean square of the matrix that the noise is added to
WRITES = ("o_proj.weight", "down_proj.weight")  # the matrices whose output is added to the hidden state
AGREES = 1e-3  # largest difference of logits, which are about 10, in float32


def widen_config(config: Any) -> Any:
    """The source's config with `WIDER` times the units and the added layers."""
    wide = type(config).from_dict(config.to_dict())
    wide.head_dim = config.hidden_size // config.num_attention_heads
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(wide, name, WIDER * getattr(config, name))
    wide.num_hidden_layers = config.num_hidden_layers + sum(EMPTY_LAYERS)
    wide.dtype = torch.float32
    return wide


def widen_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight for copied units: (out, in) -> (WIDER out, WIDER in), of which the inputs are divided."""
    if name == "model.norm.weight":
        return weight.repeat(WIDER) / WIDER  # the tied output layer reads copies
    if weight.ndim == 1:
        return weight.repeat(WIDER)
    if name == "model.embed_tokens.weight":
        return weight.repeat(1, WIDER)
    return weight.repeat(WIDER, WIDER) / WIDER


def place_layers(layers: int) -> list[int]:
    """The new position of each of the source's layers."""
    return [layer + sum(EMPTY_LAYERS[:layer]) for layer in range(layers)]


@torch.no_grad()
def widen_model(source: Any) -> Any:
    """A model that computes what `source`, a Llama with tied embeddings, does, with `WIDER` copies of each unit."""
    wide = type(source)(widen_config(source.config)).float().eval()
    for name, weight in wide.named_parameters():
        if name.endswith(WRITES):
            weight.zero_()  # an added layer writes nothing
    places = place_layers(source.config.num_hidden_layers)
    target = dict(wide.named_parameters())
    for name, weight in source.named_parameters():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(places[int(parts[2])])
        target[".".join(parts)].copy_(widen_weight(name, weight))
    return wide


@torch.no_grad()
def add_noise(model: Any, relative: float) -> None:
    """Add noise to each matrix; one that is all 0 gets that of the same matrix in the first layer."""
    sizes = {name: float(weight.square().mean().sqrt()) for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            parts = name.split(".")
            size = sizes[name] or sizes[".".join([*parts[:2], "0", *parts[3:]])]
            weight.add_(torch.randn_like(weight), alpha=relative * size)


@torch.no_grad()
def sample_text(model: Any, rows: int = 16, length: int = 128) -> torch.Tensor:
    """(rows, length) tokens that the model samples from its start token."""
    start = torch.full((rows, 1), model.config.bos_token_id)
    ids: torch.Tensor = model.generate(
        start, do_sample=True, min_new_tokens=length - 1, max_new_tokens=length - 1, top_k=0, pad_token_id=0
    )
    return ids


@torch.no_grad()
def measure_loss(model: Any, ids: torch.Tensor) -> float:
    """Nats per token."""
    return float(model(input_ids=ids, labels=ids).loss)


def write_widened(folder: Path, source_folder: Path) -> dict[str, Any]:
    """Save the widened model with its tokenizer; what was measured of it.

    Raises:
        AssertionError: the logits before the noise are not those of the source.
    """
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32).eval()
    wide, ids = widen_model(source), sample_text(source)
    with torch.no_grad():
        difference = float((wide(ids).logits - source(ids).logits).abs().max())
    assert difference < AGREES, f"the logits differ by {difference:g}"
    before = measure_loss(wide, ids)
    add_noise(wide, NOISE)
    wide.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source_folder)
    tokenizer.save_pretrained(folder)
    stories = tokenizer.batch_decode(ids, skip_special_tokens=True)
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return {
        "parameters": sum(weight.numel() for weight in wide.parameters()),
        "layers": wide.config.num_hidden_layers,
        "hidden_size": wide.config.hidden_size,
        "largest_logit_difference": difference,
        "noise": NOISE,
        "loss_on_sampled_text": {
            "source": round(measure_loss(source, ids), 4),
            "widened": round(before, 4),
            "with_noise": round(measure_loss(wide, ids), 4),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path("../shared/models/tinystories-656k"))
    args = parser.parse_args()
    print(json.dumps(write_widened(args.folder, args.source), indent=2))


if __name__ == "__main__":
    main()
