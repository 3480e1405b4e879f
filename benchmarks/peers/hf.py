"""HF Trainer with PEFT, as it comes and grouped by length, and TRL's SFTTrainer, as it comes and packed.

.venv-peers-hf/bin/python benchmarks/peers/hf.py JOB.json
"""

from __future__ import annotations

from typing import Any

import torch
from common import DEVICE, Watch, read_job, read_rows, tell
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


class Watched(TrainerCallback):
    """Starts and stops the watch with the training."""

    def __init__(self) -> None:
        self.watch = Watch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watch.stop()


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Training arguments that HF and TRL share."""
    return {
        "output_dir": job["output"],
        "num_train_epochs": 1,
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["lr"],
        "bf16": True,
        "use_cpu": DEVICE == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10**6,
        "disable_tqdm": True,
    }


def build(job: dict[str, Any]) -> Any:
    """The trainer that the job's mode names."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to(DEVICE)
    lora = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows, arguments = read_rows(job), settings(job)
    if job["mode"] in ("hf", "hf_group"):
        if job["mode"] == "hf_group":
            arguments["train_sampling_strategy"] = "group_by_length"
        return Trainer(
            get_peft_model(model, lora),
            TrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
    packing = job["mode"] == "trl_pack"
    if packing:  # rows of seq_len tokens: as many of them in a step as hold about the tokens of a plain step
        arguments["per_device_train_batch_size"] = max(1, job["batch"] // 4)
    config = SFTConfig(packing=packing, max_length=job["seq_len"], gradient_checkpointing=False, **arguments)
    return SFTTrainer(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )


def main() -> None:
    trainer = build(read_job())
    watched = Watched()
    trainer.add_callback(watched)
    result = trainer.train()
    tell(watched.watch, result.training_loss)


if __name__ == "__main__":
    main()
