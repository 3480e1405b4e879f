"""litgpt's own LoRA fine-tuning on one job, given tokens in place of texts; all of it in bf16, as it trains fastest.

    .venv-peers-litgpt/bin/python benchmarks/peers/lit_gpt.py JOB.json

Two of its parts are replaced: its schedule (its warm-up needs a step of rate 0) by the others' linear one, and its
validation, which it cannot be told to leave out, by nothing. It scores the tied embedding as a matrix of its own.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import Watch, read_job, read_rows, tell
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data.base import DataModule, get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file
from torch.utils.data import DataLoader


class Given(DataModule):
    """The job's rows, shuffled, and one of them to validate on."""

    prompt_style = "default"

    def __init__(self, rows: list[dict[str, list[int]]], batch: int) -> None:
        super().__init__()
        self.rows = [{**{k: torch.tensor(row[k]) for k in ("input_ids", "labels")}, "token_counts": {
            "raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])
        }} for row in rows]  # fmt: skip
        self.batch = batch

    def connect(self, *_: Any, **__: Any) -> None:
        """Nothing is left to be told."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.batch, shuffle=True, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows[:1], 1, collate_fn=get_sft_collate_fn())


def convert(model: Path, folder: Path) -> None:
    """The Llama as a checkpoint of litgpt's."""
    shape = json.loads((model / "config.json").read_text())
    config = Config(
        name="Llama",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        n_query_groups=shape["num_key_value_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["intermediate_size"],
        norm_eps=shape["rms_norm_eps"],
    )
    folder.mkdir(parents=True)
    save_config(config, folder)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(model / "model.safetensors"), debug_mode=True)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    torch.save(weights, folder / "lit_model.pth")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((model / name).read_text())


def main() -> None:
    job = read_job()
    checkpoint, out = Path(job["output"]) / "checkpoint", Path(job["output"]) / "run"
    convert(Path(job["model"]), checkpoint)
    rows, watch, fit = read_rows(job), Watch(), lora.fit
    steps = len(rows) // job["batch"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.start()
        fit(*args, **kwargs)
        watch.stop()
        tell(watch, mean_loss(out))
        raise SystemExit  # what follows merges the adapter and saves

    lora.fit = watched
    lora.validate = lambda *_, **__: torch.zeros(())
    lora.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / steps
    )
    lora.setup(
        checkpoint,
        out,
        precision="bf16-true",
        lora_r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        **dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True),
        data=Given(rows, job["batch"]),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job["batch"],
            micro_batch_size=job["batch"],
            lr_warmup_steps=1,
            epochs=2,
            max_steps=steps,
        ),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": job["lr"], "weight_decay": 0.0}},
    )


def mean_loss(out: Path) -> float:
    """The mean of the losses that it logged."""
    (path,) = out.rglob("metrics.csv")
    with path.open() as file:
        return statistics.fmean(float(row["loss"]) for row in csv.DictReader(file) if row.get("loss"))


if __name__ == "__main__":
    main()
