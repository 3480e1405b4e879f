"""TRL's own preparation of prompt and completion rows, as SFTTrainer does it when it is made; prints one JSON line.

    .venv-peers-hf/bin/python benchmarks/peers/prepare_trl.py ROWS.jsonl TOKENIZER CACHE PROCESSES

Timed apart: `load_dataset` of the file, and the maps of `SFTTrainer` (end token, tokens of prompt and of both, labels,
truncation, filter), which write to the cache. The model that it must be given has one layer of 8.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["HF_DATASETS_CACHE"] = sys.argv[3]

from common import peak_bytes
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

MAX_LENGTH = 1024


class Timed(SFTTrainer):
    """Notes how long the preparation took."""

    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.seconds = time.perf_counter() - started
        return prepared


def main() -> None:
    rows, folder, cache, processes = sys.argv[1:]
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    started = time.perf_counter()
    dataset = load_dataset("json", data_files=rows, split="train")
    reading = time.perf_counter() - started
    settings = {"output_dir": cache, "report_to": [], "use_cpu": True, "max_length": MAX_LENGTH, "bf16": False}
    workers = int(processes) if int(processes) > 1 else None
    trainer = Timed(
        model, SFTConfig(dataset_num_proc=workers, **settings), train_dataset=dataset, processing_class=tokenizer
    )
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    print(
        json.dumps(
            {
                "seconds": trainer.seconds,
                "reading_seconds": reading,
                "tokens": tokens,
                "rows": len(trainer.train_dataset),
                "peak_bytes": peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
