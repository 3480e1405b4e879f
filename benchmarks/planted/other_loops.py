"""Training loops other than ours, without a fault: one written by hand, and the HF Trainer, each with the lens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from planted_rows import BATCH

STEPS = 45
IGNORED = -100


class OwnLoop:
    """A loop written by hand, without a fault; each fault overrides a method.

    Args:
        plan: of the case's run, for its tokens.
        strength: of the fault.
    """

    factor = 1.0  # of the rate

    def __init__(self, plan: Any, strength: Any) -> None:
        self.plan, self.strength = plan, strength
        torch.manual_seed(plan.config.training.seed)
        self.model = self.build_model()
        self.rate = self.factor * plan.config.training.lr
        self.prepare_model()
        self.optimizer = self.build_optimizer()

    def build_model(self) -> Any:
        """The base with a fresh LoRA of rank 8 on all projections."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.plan.config.model.id, dtype=torch.float32)
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    def prepare_model(self) -> None:
        """What a fault does to the model before training."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], self.rate, weight_decay=0.0)

    def read_example(self, index: int) -> tuple[list[int], list[int]]:
        """Tokens and labels of a row."""
        example = self.plan.train[index]
        ids = example.input_ids.tolist()
        return ids, [i if kept else IGNORED for i, kept in zip(ids, example.loss_mask, strict=True)]

    def pad_batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Rows padded on the right; pad is never a label."""
        width, pad = max(len(ids) for ids, _ in rows), self.plan.tokenizer.eos_token_id
        fill = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
        columns = {"input_ids": [r[0] for r in rows], "labels": [r[1] for r in rows]}
        columns["attention_mask"] = [[1] * len(ids) for ids, _ in rows]
        return {k: torch.tensor([v + [fill[k]] * (width - len(v)) for v in of]) for k, of in columns.items()}

    def list_batches(self) -> list[dict[str, torch.Tensor]]:
        """Every step's batch."""
        drawn = torch.Generator().manual_seed(self.plan.config.training.seed)
        order = torch.cat([torch.randperm(len(self.plan.train), generator=drawn) for _ in range(2)]).tolist()
        steps = [order[i * BATCH : (i + 1) * BATCH] for i in range(STEPS)]
        return [self.pad_batch([self.read_example(i) for i in rows]) for rows in steps]

    def run_backward(self, loss: torch.Tensor, step: int) -> None:
        """The backward pass."""
        loss.backward()

    def finish_step(self, step: int) -> None:
        """After the update."""
        self.optimizer.zero_grad()

    def train(self, folder: Path) -> None:
        """All steps, with the lens in `folder`."""
        from training_lens.core import TrainingLensFramework

        batches = self.list_batches()
        lens = TrainingLensFramework(folder, probe=batches[-1])
        with lens.watch(self.model, self.optimizer):
            for step, batch in enumerate(batches, start=1):
                loss = self.model(**batch).loss
                self.run_backward(loss, step)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                lens.step(loss.detach(), lr=self.optimizer.param_groups[0]["lr"])
                self.finish_step(step)


class TrainerLoop(OwnLoop):
    """The same run in the HF Trainer."""

    def train(self, folder: Path) -> None:
        from training_lens.core import TrainingLensFramework

        rows = [
            dict(zip(("input_ids", "labels"), self.read_example(i), strict=True)) for i in range(len(self.plan.train))
        ]
        collate: Callable[[Any], Any] = lambda batch: self.pad_batch([(r["input_ids"], r["labels"]) for r in batch])  # noqa: E731
        lens = TrainingLensFramework(folder, probe=collate(rows[:8]))
        settings = transformers.TrainingArguments(
            str(folder.parent / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=self.rate,
            eval_strategy="steps",
            eval_steps=STEPS // 6,
            eval_delay=0,
            per_device_eval_batch_size=16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=self.plan.config.training.seed,
            logging_steps=1000,
        )
        held = self.plan.validation
        held_rows = [self.held_out_row(held[i]) for i in range(min(16, len(held)))]
        trainer = transformers.Trainer(
            self.model,
            settings,
            collate,
            rows,
            held_rows,
            optimizers=(self.optimizer, None),
            callbacks=[lens.trainer_callback()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    def held_out_row(self, example: Any) -> dict[str, list[int]]:
        """A validation row as the Trainer takes it."""
        ids = example.input_ids.tolist()
        return {
            "input_ids": ids,
            "labels": [i if kept else IGNORED for i, kept in zip(ids, example.loss_mask, strict=True)],
        }
