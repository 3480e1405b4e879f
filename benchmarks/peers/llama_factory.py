"""LLaMA-Factory's own training command on one job, given tokens in place of texts.

.venv-peers-llamafactory/bin/python benchmarks/peers/llama_factory.py JOB.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import DEVICE, Watch, read_job, read_rows, tell
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Watched(TrainerCallback):
    """Starts and stops the watch with the training, and keeps the loss that it ends with."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.loss = float("nan")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.watch.stop()
        self.loss = next(line["train_loss"] for line in reversed(state.log_history) if "train_loss" in line)


def main() -> None:
    job = read_job()
    tokens = Path(job["output"]) / "tokens"
    DatasetDict({"train": Dataset.from_list(read_rows(job))}).save_to_disk(str(tokens))
    watched = Watched()
    run_exp(
        {
            "model_name_or_path": job["model"],
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": job["rank"],
            "lora_alpha": job["alpha"],
            "lora_dropout": 0.0,
            "lora_target": "all",
            "dataset": "given_as_tokens",
            "tokenized_path": str(tokens),
            "template": "empty",
            "cutoff_len": job["seq_len"],
            "output_dir": str(Path(job["output"]) / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": job["batch"],
            "gradient_accumulation_steps": 1,
            "learning_rate": job["lr"],
            "bf16": True,
            "use_cpu": DEVICE == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 10**6,
            "disable_gradient_checkpointing": True,
            "disable_tqdm": True,
        },
        callbacks=[watched],
    )
    tell(watched.watch, watched.loss)


if __name__ == "__main__":
    main()
