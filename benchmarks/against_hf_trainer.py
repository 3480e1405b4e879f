"""The same fine-tune by Training Lens and by the HF Trainer with PEFT: same rows, tokens, hyper-parameters and seed.

    python benchmarks/against_hf_trainer.py [--model ../shared/models/tinystories-656k]
        [--train ../shared/data/gsm8k/train.jsonl] [--validation ../shared/data/gsm8k/test.jsonl] [--rows 2000]

Both get the tokens that Training Lens makes and start from the same adapter. Prints one JSON object: the final
validation loss of each (measured by one and the same evaluator), their ratio, and the seconds each took to train.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from training_lens import TrainingConfig, TrainingWrapper
from training_lens.data.token_dataset import TokenDataset
from training_lens.evaluation.evaluator import EvaluationOptions, evaluate_loss
from training_lens.models.adapters import attach, load_adapter
from training_lens.models.factory import load_model, load_tokenizer
from training_lens.utils.devices import seed_everything
from training_lens.utils.processes import Processes

CPU = torch.device("cpu")


def hf_train(model: Any, dataset: TokenDataset, config: TrainingConfig, folder: str) -> float:
    """Train with the HF Trainer at the config's hyper-parameters; the seconds it took."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    training = config.training
    rows = [
        {
            "input_ids": e.input_ids.tolist(),
            "labels": [int(i) if m else -100 for i, m in zip(e.input_ids, e.loss_mask, strict=True)],
        }
        for e in dataset
    ]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.lr,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        adam_beta2=0.999,
        seed=training.seed,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )

    collator = DataCollatorForSeq2Seq(load_tokenizer(config.model))
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared"
    parser.add_argument("--model", default=str(shared / "models/tinystories-656k"))
    parser.add_argument("--train", default=str(shared / "data/gsm8k/train.jsonl"))
    parser.add_argument("--validation", default=str(shared / "data/gsm8k/test.jsonl"))
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig.model_validate(
            {
                "model": {"id": args.model},
                "data": {"train": args.train, "validation": args.validation, "max_examples": args.rows},
                "training": {"lr": 1e-3, "epochs": 1},
                "output": {"base_output_dir": folder},
            }
        )
        wrapper = TrainingWrapper(config)
        plan = wrapper.plan()
        assert plan.validation is not None
        summary = wrapper.train()

        def loss_of(model: Any) -> float:
            assert plan.validation is not None
            return evaluate_loss(
                model, plan.validation, EvaluationOptions(Processes(CPU), "fp32", 8192, plan.tokenizer.eos_token_id)
            ).loss

        ours = load_adapter(load_model(plan.config.model, CPU, "fp32"), Path(summary.run_dir) / "artifacts/adapter")
        base = loss_of(load_model(plan.config.model, CPU, "fp32"))
        seed_everything(plan.config.training.seed)  # as the run did: the same random A
        theirs = attach(load_model(plan.config.model, CPU, "fp32"), plan.config.peft)
        seconds = hf_train(theirs, plan.train, plan.config, folder)
        losses = loss_of(ours), loss_of(theirs)
    print(
        json.dumps(
            {
                "model": Path(args.model).name,
                "train_rows": len(plan.train),
                "validation_rows": len(plan.validation),
                "base_validation_loss": base,
                "training_lens": {"validation_loss": losses[0], "train_seconds": summary.seconds},
                "hf_trainer_peft": {"validation_loss": losses[1], "train_seconds": seconds},
                "validation_loss_ratio": losses[0] / losses[1],
                "speed_ratio": seconds / summary.seconds,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
