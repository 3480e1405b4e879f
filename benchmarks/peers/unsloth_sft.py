"""unsloth with TRL's SFTTrainer, as its guides have it; it needs a GPU.

.venv-peers-unsloth/bin/python benchmarks/peers/unsloth_sft.py JOB.json
"""

from __future__ import annotations

import unsloth  # isort: skip  (it changes what is imported after it)
from hf import Watched, settings  # isort: skip
from common import read_job, read_rows, tell
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = read_job()
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["seq_len"], load_in_4bit=False, dtype=None
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules=LINEAR,
        use_gradient_checkpointing=False,
    )
    config = SFTConfig(max_length=job["seq_len"], **settings(job))
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(read_rows(job)), processing_class=tokenizer)
    watched = Watched()
    trainer.add_callback(watched)
    result = trainer.train()
    tell(watched.watch, result.training_loss, unsloth=unsloth.__version__)


if __name__ == "__main__":
    main()
